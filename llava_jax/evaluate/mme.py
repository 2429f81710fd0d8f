"""MME: two questions of yes or no about each picture, in ten categories of perception and four of cognition."""

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.answers import Answer, by_key, check_asked
from llava_jax.evaluate.benchmark import SHORT, Benchmark, Judged, Labels, unique
from llava_jax.evaluate.lines import Line, read_text
from llava_jax.evaluate.questions import Question

PARTS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                   "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
ASKS = "Please answer yes or no."
PICTURES = (".jpg", ".png", ".jpeg")


class Label(NamedTuple):
    category: str
    picture: str
    right: str  # yes or no


def read_answer(text: str) -> str:
    """`yes` or `no`, as the official tool reads it in the first four characters; else `other`, which is wrong."""
    beginning = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in beginning), "other")


def score(pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
    """Of each category accuracy and accuracy+ (pictures both of whose answers are right), in percent; their sum is the
    score. `failed` answers are neither yes nor no."""
    pictures: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    read = [(answer.read(read_answer, "other"), label) for answer, label in pairs]
    for answer, label in read:
        pictures[label.category][label.picture].append(answer == label.right)
    categories = {category: _score(list(by_picture.values())) for category, by_picture in sorted(pictures.items())}
    parts = {
        part: round(sum(categories[name]["score"] for name in names if name in categories), 2)
        for part, names in PARTS.items()
    }
    failed = sum(answer == "other" for answer, _ in read)
    rounded = {name: {key: round(x, 2) for key, x in values.items()} for name, values in categories.items()}
    return parts | {"by_category": rounded, "total": len(pairs), "failed": failed}


def judged(pairs: Sequence[tuple[Answer, Label]]) -> Iterator[Judged]:
    """Each picture: the share of its answers that are right, and one more for all, of 2. Categories count alike, so
    that the score of several is their sum in percent of what can be had."""
    pictures: dict[tuple[str, str], list[tuple[Answer, Label]]] = defaultdict(list)
    for answer, label in pairs:
        pictures[label.category, label.picture].append((answer, label))
    in_category = Counter(category for category, _ in pictures)
    for (category, picture), own in pictures.items():
        scores = _score([[answer.read(read_answer, "other") == label.right for answer, label in own]])
        part = next(part for part, names in PARTS.items() if category in names)
        yield Judged(
            f"{category}/{picture}", own, (part, category), scores["score"] / 100, 2.0, 1 / in_category[category]
        )


def _score(pictures: Sequence[Sequence[bool]]) -> dict[str, float]:
    answers = [right for picture in pictures for right in picture]
    accuracy = 100 * sum(answers) / len(answers)
    both = 100 * sum(len(picture) == 2 and all(picture) for picture in pictures) / len(pictures)
    return {"acc": accuracy, "acc+": both, "score": accuracy + both}


def labels(paths: Sequence[str], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
    """By category, picture and question, as published answers tell them."""
    found = unique(
        (_key(category, picture, question), Label(category, PurePath(picture).stem, answer), where)
        for path in paths
        for category, picture, question, answer, where in _entries(path)
    )

    def key(line: Line) -> str:
        category, _, picture = line.text("question_id").partition("/")
        return _key(category, picture, line.text("prompt"))

    return Labels(found, key)


def _key(category: str, picture: str, question: str) -> str:
    bare = question.replace(SHORT, "").replace(ASKS, "")
    return f"{category}/{PurePath(picture).stem}: {' '.join(bare.split())}"


def _entries(path: str) -> Iterator[tuple[str, str, str, str, str]]:
    """Category, picture, question, answer and where it stands, of MME's own folder or its tool's folder of results.

    The former has a folder a category, with a text file a picture (`question TAB answer`) beside the pictures or under
    `questions_answers_YN`; the latter a file a category (`picture TAB question TAB answer ...`).
    """
    root = epath.Path(path)
    if not root.is_dir():
        raise UserError(f"{path}: is no folder: MME's labels are a folder of categories")
    names = {name for part in PARTS.values() for name in part}
    known = [item for item in sorted(root.iterdir()) if item.stem in names]
    if not known:
        raise UserError(f"{path}: has none of MME's categories, such as {min(names)}")
    for item in known:
        if not item.is_dir():
            for where, (picture, question, answer, *_) in _rows(item, (3, 4)):
                yield item.stem, picture, question, _yes_or_no(answer, where), where
            continue
        folder = item / "questions_answers_YN"
        for file in sorted((folder if folder.exists() else item).glob("*.txt")):
            for where, (question, answer) in _rows(file, (2,)):
                yield item.name, file.name, question, _yes_or_no(answer, where), where


def _rows(file: epath.Path, fields: Sequence[int]) -> Iterator[tuple[str, list[str]]]:
    for number, row in enumerate(read_text(file).splitlines(), 1):
        values = row.strip().split("\t")
        if row.strip() and len(values) not in fields:
            raise UserError(f"{file}: line {number}: has {len(values)} fields separated by tabs, not {fields[0]}")
        if row.strip():
            yield f"{file}: line {number}", values


def _yes_or_no(answer: str, where: str) -> str:
    if (answer := answer.strip().lower()) not in ("yes", "no"):
        raise UserError(f"{where}: the answer is {answer!r}, neither yes nor no")
    return answer


def questions(path: str) -> Iterator[Question]:
    """Of MME's own folder, whose pictures have names relative to it. What the v1.5 release adds to each question stands
    in place of MME's own request for yes or no."""
    root = epath.Path(path)
    for category, file, question, _, where in _entries(path):
        stem = PurePath(file).stem
        places = [root / category / sub for sub in ("", "images")]
        names = [f"{stem}{suffix}" for suffix in PICTURES]
        found = next((place / name for place in places for name in names if (place / name).exists()), None)
        if found is None:
            raise UserError(f"{where}: there is no picture {stem}{PICTURES[0]} (or {', '.join(PICTURES[1:])})")
        text = question.replace(ASKS, "").strip()
        yield Question(f"{category}/{found.name}", text, (str(found.relative_to(root)),))


def submission(lines: Sequence[Line], own: str | None) -> dict[str, bytes]:
    """The folder that MME's tool reads: a file a category."""
    if own is None:
        raise UserError("--labels: MME's folder is needed, since its tool wants the right answers in the files")
    right = labels([own], lines, ())
    answers = by_key(lines, right.key)
    check_asked(answers, right, own)
    files: dict[str, list[str]] = defaultdict(list)
    for category, picture, question, answer, _ in _entries(own):
        if (said := answers.get(_key(category, picture, question))) is not None:
            text = " ".join((said.text or "").split())
            files[f"{category}.txt"].append("\t".join((PurePath(picture).stem + ".txt", question, answer, text)))
    return {name: ("\n".join(rows) + "\n").encode() for name, rows in files.items()}


MME = Benchmark(
    "MME: perception and cognition", questions, SHORT, labels=labels, score=score, judged=judged, submission=submission
)
