"""Reviews of LLaVA-Bench as outcomes, to compare runs: what the judge gave the model, of what it gave the reference."""

from collections.abc import Mapping, Sequence

from llava_jax.evaluate.answers import answer_of
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.outcomes import Outcome
from llava_jax.evaluate.reviews import Review

Texts = Mapping[str, Line]  # lines of a file by question id


def outcomes(files: Sequence[Sequence[Review]], questions: Texts, answers: Texts, reference: Texts) -> list[Outcome]:
    """One of each question, the sum over the orders and repeats in which it was judged; texts where they are given."""
    reviews: dict[str, list[Review]] = {}
    for review in (review for file in files for review in file):
        reviews.setdefault(review.question_id, []).append(review)
    return [
        _outcome(ident, of_it, _text(questions, ident, "image"), _text(questions, ident), _said(answers, ident),
                 _said(reference, ident))
        for ident, of_it in reviews.items()
    ]  # fmt: skip


def _outcome(ident: str, reviews: Sequence[Review], image: str, question: str, answer: str, reference: str) -> Outcome:
    scored = [review.scores for review in reviews if review.scores]
    first = reviews[0]
    return Outcome(
        ident,
        () if first.category is None else (first.category,),
        score=sum(model for _, model in scored),
        of=sum(reference for reference, _ in scored),
        question=question,
        image=image,
        answer=answer,
        reference=reference,
        judgement="\n\n".join(review.content for review in reviews),
        judge=first.judge or "",
        prompt_hash=first.prompt_hash or "",
    )


def _text(lines: Texts, ident: str, name: str = "text") -> str:
    return str(lines[ident].value.get(name, "")) if ident in lines else ""


def _said(lines: Texts, ident: str) -> str:
    """An answer without its thinking."""
    return answer_of(lines[ident], ("text",)).text or "" if ident in lines else ""
