"""HallusionBench: yes-or-no questions about illusions and edited figures, in sets that have to be right together."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.benchmark import register
from llava_jax.evaluate.dataset_files import Item
from llava_jax.evaluate.lines import Line
from llava_jax.evaluate.rule_texts import yes_or_no
from llava_jax.evaluate.ruled import VLMEVAL_API, RuledBenchmark, bare
from llava_jax.evaluate.ruled_judge import RuledJudge
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Case, Reading, Rule, Term

PLACE = ("category", "subcategory", "set_id", "figure_id", "question_id")
VERDICTS = {"0": "incorrect", "1": "correct", "2": "unclear"}
PROMPT = (
    "You grade answers to questions about an image. Compare the answer with the reference, and reply with one word: "
    "correct if it does not conflict with the reference, incorrect if it does, unclear if it does not say.\n\n"
    "Question: {question}\nReference: {reference}\nAnswer: {answer}\nVerdict:"
)


def verdict(reply: str) -> str:
    """`correct`, `incorrect` or `unclear`, from a judge's words or the official number of its verdict."""
    lower = VERDICTS.get(reply.strip(), reply.lower())
    return next((word for word in ("incorrect", "correct") if word in lower), "unclear")


def _is_verdict(reply: str) -> bool:
    return reply.strip() in VERDICTS or any(word in reply.lower() for word in ("correct", "unclear"))


def judged(text: str, item: Item) -> Reading:
    """A judge's verdict; without one, that of the words yes and no. Unclear is wrong, unless there is no image."""
    word = None if _is_verdict(item.reply or "") else yes_or_no(item.reply or "")  # which VLMEvalKit's judges write
    if item.reply is not None and word is None:
        said, why = verdict(item.reply), "judge"
    else:
        word = word or yes_or_no(text)
        said = "unclear" if word is None else "correct" if word == item.answers[0] else "incorrect"
        why = "the only one of the words yes and no"
    place = item.more["place"]
    unknown = said == "unclear" and place["category"] == "VS" and place["figure_id"] == "0"
    return Reading(float(said == "correct" or unknown), None if said == "unclear" else said, why)


def words(text: str, item: Item) -> Reading:
    said = yes_or_no(text)
    if said is None and item.reply is not None:
        said = yes_or_no(item.reply)
    return Reading(float(said == item.answers[0]), said, "the only one of the words yes and no")


def _together(cases: Sequence[Case], name: str, places: Sequence[str]) -> Iterator[Term]:
    """A term for each group of answers that are all right or not."""
    groups: dict[str, list[Case]] = defaultdict(list)
    for case in cases:
        groups["_".join(case.label.more["place"][place] for place in places)].append(case)
    for key, some in groups.items():
        right = float(all(case.reading.score for case in some))
        yield Term(f"{name} {key}", tuple(some), right, 1.0, "", (name,), some[0].label.cluster, headline=False)


def _without_images(cases: Sequence[Case]) -> list[Case]:
    return [case for case in cases if case.label.more["place"]["visual_input"] != "0"]


QUESTION, FIGURE = (
    ("category", "subcategory", "set_id", "question_id"),
    ("category", "subcategory", "set_id", "figure_id"),
)


def official_terms(cases: Sequence[Case]) -> Iterable[Term]:
    """The headline is aAcc. qAcc wants a question right about all figures, fAcc all questions about a figure; easy and
    hard are qAcc about original figures and about edited ones."""
    for case in cases:
        categories = ("aAcc", case.label.more["place"]["category"])
        yield Term(case.label.id, (case,), case.reading.score, 1.0, "", categories, case.label.cluster)
    shown = [case for case in cases if case.label.categories[0] != "VS" or case.label.more["place"]["figure_id"] != "0"]
    yield from _together(shown, "fAcc", FIGURE)
    yield from _together(cases, "qAcc", QUESTION)
    for name, original in (("easy", True), ("hard", False)):
        some = [case for case in cases if (case.label.more["place"]["figure_id"] == "0") == original]
        yield from _together(some, name, QUESTION)


def vlmevalkit_terms(cases: Sequence[Case]) -> Iterable[Term]:
    """The headline is the mean of aAcc, fAcc and qAcc, whose groups have the same subcategory and set."""
    cases = _without_images(cases)
    for case in cases:
        yield Term(case.label.id, (case,), case.reading.score, 1.0, "aAcc", ("aAcc",), case.label.cluster)
    for name, place in (("fAcc", "figure_id"), ("qAcc", "question_id")):
        yield from (
            term._replace(part=name, headline=True) for term in _together(cases, name, ("subcategory", "set_id", place))
        )


@register
class HallusionBench(RuledBenchmark):
    name, what = "hallusionbench", "HallusionBench: right answers, figures and questions"
    label_files = "the official `HallusionBench.json`, the Hub's Parquet, VLMEvalKit's TSV"
    prompts = {LMMS: bare, OFFICIAL: bare, VLMEVAL: bare, VLMEVAL_API: bare}
    prediction = "model_prediction"
    judge = RuledJudge(PROMPT, bare)
    rules = {
        OFFICIAL: Rule("aAcc by a judge; without its verdicts the words yes and no decide, both or neither is unclear",
                       judged, official_terms),
        LMMS: Rule("as official, without the questions that have no image", judged,
                   lambda cases: official_terms(_without_images(cases))),
        VLMEVAL: Rule("mean of aAcc, fAcc and qAcc; the only one of the words yes and no; a judge sees the others",
                      words, vlmevalkit_terms),
    }  # fmt: skip

    def item(self, line: Line, number: int) -> Item:
        """In VLMEvalKit's table the index ends with the set, the figure and the question."""
        row = line.value
        place = {name: str(row.get(name, "")) for name in PLACE}
        if row.keys() >= set(PLACE):
            ident = "_".join(place.values())
        else:
            ident = files.text(line, "index")
            parts = ident.split("_")
            place |= dict(zip(PLACE[2:], [*parts[3:6], "", "", ""], strict=False))
            place |= {"subcategory": str(files.first(row, "l2-category", "l2_category") or "")}
        shown = "0" if place["category"] == "VS" and place["figure_id"] == "0" else "1"
        place["visual_input"] = str(row.get("visual_input", shown))
        right = files.text(line, "gt_answer", "answer").lower()
        answers = ({"1": "yes", "0": "no"}.get(right, right),)
        cluster = "_".join(place[name] for name in PLACE[:3])
        categories, more = (place["category"], place["subcategory"]), {"place": place}
        return files.item(line, number, id=ident, options=(), answers=answers, categories=categories, cluster=cluster,
                          more=more)  # fmt: skip

    def shows(self, item: Item) -> bool:
        return item.more["place"]["visual_input"] != "0"

    def answer_id(self, line: Line) -> str:
        """The official id in the official file, of which `question_id` is a part only, or VLMEvalKit's index."""
        if all(name in line.value for name in PLACE):
            return "_".join(str(line.value[name]) for name in PLACE)
        return str(line.value["index"]) if "index" in line.value else super().answer_id(line)
