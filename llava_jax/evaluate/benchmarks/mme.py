"""MME: two yes-or-no questions about each image, in ten categories of perception and four of cognition."""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from pathlib import PurePath
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate import dataset_files as files
from llava_jax.evaluate.answers import Answer, by_key, check_asked
from llava_jax.evaluate.benchmark import SHORT, Benchmark, Group, Labels, register
from llava_jax.evaluate.label_formats import unique
from llava_jax.evaluate.lines import Line, read_text
from llava_jax.evaluate.questions import Question
from llava_jax.evaluate.rule_texts import yes_or_no
from llava_jax.evaluate.rules import LMMS, OFFICIAL, VLMEVAL, Case, Reading, Rule, Term

PARTS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene", "landmark", "artwork",
                   "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning"),
}  # fmt: skip
ASKS = "Please answer yes or no."
IMAGES = (".jpg", ".png", ".jpeg")


class Label(NamedTuple):
    category: str
    image: str
    right: str  # yes or no


class Entry(NamedTuple):
    """A question with its answer, from a file of MME."""

    category: str
    image: str  # a file name
    question: str
    answer: str
    where: str


def read_answer(text: str) -> str:
    """`yes` or `no`, which the official tool looks for in the first four characters; else `other`, which is wrong."""
    beginning = text.lower()[:4]
    return next((word for word in ("yes", "no") if word in beginning), "other")


def lmms_answer(text: str) -> str:
    """As the official tool, after white space at both ends and full stops are removed; y and n are yes and no."""
    text = text.lower().strip().replace(".", "")
    return {"y": "yes", "n": "no"}.get(text, read_answer(text))


def _rule(what: str, read: Callable[[str], str | None], parts: Sequence[str]) -> Rule:
    """A rule whose score is the sum of accuracy and accuracy+ over the categories of `parts`."""

    def reading(text: str, label: Label) -> Reading:
        said = read(text)
        return Reading(float(said == label.right), None if said == "other" else said, what)

    def terms(cases: Sequence[Case]) -> Iterator[Term]:
        images: dict[tuple[str, str], list[Case]] = defaultdict(list)
        for case in cases:
            images[case.label.category, case.label.image].append(case)
        for (category, image), own in images.items():
            part = next(part for part, names in PARTS.items() if category in names)
            got = _score([[bool(case.reading.score) for case in own]])["score"] / 100
            name = f"{category}/{image}"
            yield Term(name, tuple(own), got, 2.0, category, (part, category), name, part in parts)

    return Rule(f"{' and '.join(parts)}; {what}", reading, terms, points=200.0, sums=True)


def _score(images: Sequence[Sequence[bool]]) -> dict[str, float]:
    answers = [right for image in images for right in image]
    accuracy = 100 * sum(answers) / len(answers)
    both = 100 * sum(len(image) == 2 and all(image) for image in images) / len(images)
    return {"acc": accuracy, "acc+": both, "score": accuracy + both}


def _key(entry: Entry) -> str:
    bare = entry.question.replace(SHORT, "").replace(ASKS, "")
    return f"{entry.category}/{PurePath(entry.image).stem}: {' '.join(bare.split())}"


def read(path: str) -> Iterator[Entry]:
    """The entries of MME's own folder, or of its tool's folder of results.

    The former has a folder for each category, with a text file for each image (`question TAB answer`) beside the images
    or in `questions_answers_YN`. The latter has a file for each category (`image TAB question TAB answer ...`).
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
            for where, (image, question, answer, *_) in _rows(item, (3, 4)):
                yield Entry(item.stem, image, question, _yes_or_no(answer, where), where)
            continue
        folder = item / "questions_answers_YN"
        for file in sorted((folder if folder.exists() else item).glob("*.txt")):
            for where, (question, answer) in _rows(file, (2,)):
                yield Entry(item.name, file.name, question, _yes_or_no(answer, where), where)


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


def _of_row(line: Line) -> tuple[list[Label], list[str], str]:
    right = files.text(line, "answer")
    image, category = files.text(line, "image_path", "question_id"), files.text(line, "category")
    if not any(category in names for names in PARTS.values()):
        raise UserError(f"{line.where}: its category {category} is none of MME's")
    return (
        [Label(category, PurePath(image).stem, _yes_or_no(right, line.where))],
        [right],
        str(line.value.get("question", "")),
    )


@register
class Mme(Benchmark):
    name, what = "mme", "MME: perception and cognition, accuracy and accuracy+"
    label_files, entries, of_row = "MME's folder", staticmethod(read), staticmethod(_of_row)
    suffix = SHORT
    rules = {
        OFFICIAL: _rule("yes or no in the first four characters", read_answer, ("perception",)),
        LMMS: _rule("yes or no in the first four characters, without full stops", lmms_answer, ("perception",)),
        VLMEVAL: _rule("the only one of the words yes and no", yes_or_no, tuple(PARTS)),
    }

    def questions(self, path: str) -> Iterator[Question]:
        """From MME's own folder; images are named relative to it. The suffix of the v1.5 release replaces MME's request
        for yes or no."""
        root = epath.Path(path)
        for entry in read(path):
            stem = PurePath(entry.image).stem
            folders = [root / entry.category / sub for sub in ("", "images")]
            names = [f"{stem}{suffix}" for suffix in IMAGES]
            found = next((folder / name for folder in folders for name in names if (folder / name).exists()), None)
            if found is None:
                raise UserError(f"{entry.where}: there is no image {stem}{IMAGES[0]} (or {', '.join(IMAGES[1:])})")
            text = entry.question.replace(ASKS, "").strip()
            yield Question(f"{entry.category}/{found.name}", text, (str(found.relative_to(root)),))

    def labels(self, entries: Sequence[Entry], lines: Sequence[Line], asked: Sequence[Question]) -> Labels:
        """By category, image and question, which published answers have."""
        found = unique(
            (_key(entry), Label(entry.category, PurePath(entry.image).stem, entry.answer), entry.where)
            for entry in entries
        )

        def key(line: Line) -> str:
            category, _, image = line.text("question_id").partition("/")
            return _key(Entry(category, image, line.text("prompt"), "", line.where))

        return Labels(found, key)

    def score(self, pairs: Sequence[tuple[Answer, Label]]) -> dict[str, Any]:
        """Accuracy and accuracy+ (images with both answers right) of each category, in percent; their sum is the score.
        `failed` answers are neither yes nor no."""
        images: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
        read = [(answer.read(read_answer, "other"), label) for answer, label in pairs]
        for answer, label in read:
            images[label.category][label.image].append(answer == label.right)
        categories = {category: _score(list(by_image.values())) for category, by_image in sorted(images.items())}
        parts = {
            part: round(sum(categories[name]["score"] for name in names if name in categories), 2)
            for part, names in PARTS.items()
        }
        failed = sum(answer == "other" for answer, _ in read)
        rounded = {name: {key: round(x, 2) for key, x in values.items()} for name, values in categories.items()}
        return parts | {"by_category": rounded, "total": len(pairs), "failed": failed}

    def groups(self, pairs: Sequence[tuple[Answer, Label]]) -> Iterator[Group]:
        """The answers about each image: the share that is right, plus one if all are, of 2. Weights make all categories
        equal, so that the score of several categories is their sum in percent of the maximum."""
        images: dict[tuple[str, str], list[tuple[Answer, Label]]] = defaultdict(list)
        for answer, label in pairs:
            images[label.category, label.image].append((answer, label))
        in_category = Counter(category for category, _ in images)
        for (category, image), own in images.items():
            scores = _score([[answer.read(read_answer, "other") == label.right for answer, label in own]])
            part = next(part for part, names in PARTS.items() if category in names)
            weight = 1 / in_category[category]
            yield Group(f"{category}/{image}", own, (part, category), scores["score"] / 100, 2.0, weight)

    def submission(self, lines: Sequence[Line], own: str | None) -> dict[str, bytes]:
        """The folder that MME's tool reads: a file for each category."""
        if own is None:
            raise UserError("--labels: MME's folder is needed, since its tool wants the right answers in the files")
        entries = list(read(own))
        right = self.labels(entries, lines, ())
        answers = by_key(lines, right.key)
        check_asked(answers, right, own)
        files: dict[str, list[str]] = defaultdict(list)
        for entry in entries:
            if (said := answers.get(_key(entry))) is not None:
                text = " ".join((said.text or "").split())
                row = (PurePath(entry.image).stem + ".txt", entry.question, entry.answer, text)
                files[f"{entry.category}.txt"].append("\t".join(row))
        return {name: ("\n".join(rows) + "\n").encode() for name, rows in files.items()}
