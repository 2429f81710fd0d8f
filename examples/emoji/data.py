"""Emoji of animals, food and drinks: images of four vendors, and what is said and asked about them.

Three vendors are trained on. The fourth, whose images are the test, is seen by nothing before the evaluation.
"""

import io
import json
import random
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from examples.emoji.drawing import on_white, variation
from examples.emoji.packages import ANNOTATIONS, IMAGES, fetch, read_files, read_json
from llava_jax.cli import Parser, UserError, run, say, track
from llava_jax.files.writing import atomic_file

HELD_OUT = "twitter"
TRAINED = tuple(vendor for vendor in IMAGES if vendor != HELD_OUT)
KINDS = {  # by Unicode's subgroup
    "animal-mammal": "mammal",
    "animal-bird": "bird",
    "animal-amphibian": "reptile or amphibian",
    "animal-reptile": "reptile or amphibian",
    "animal-marine": "sea animal",
    "animal-bug": "bug",
    "food-fruit": "fruit",
    "food-vegetable": "vegetable",
    "food-prepared": "dish",
    "food-asian": "dish",
    "food-sweet": "dessert",
    "drink": "drink",
}
ARTICLES = {kind: "an" if kind[0] in "aeiou" else "a" for kind in KINDS.values()}
VARIATIONS = 4  # images of each drawing to train the assistant on, the drawing itself included
NAME, KIND, YES_OR_NO = "name", "kind", "yes or no"  # categories of questions
ASK_NAME, ASK_KIND, ASK_WHETHER = "What is this?", "What kind of thing is it?", "Is it called {name}?"


class Emoji(NamedTuple):
    """An emoji as all vendors draw it."""

    id: str  # its code points, as in "1f436"
    name: str  # CLDR's, unique
    kind: str
    keywords: tuple[str, ...]  # CLDR's, without the name

    def image(self, vendor: str, number: int = 0) -> str:
        """The name of an image: the drawing itself, or a variation of it."""
        return f"{vendor}/{self.id}{f'-{number}' if number else ''}.png"


def main(argv: list[str] | None = None) -> None:
    parser = Parser(prog="python -m examples.emoji.data", description=__doc__)
    parser.add_argument("--root", required=True, type=Path, metavar="D", help="gets packages/, images/ and data/")
    parser.add_argument("--packages", type=Path, metavar="D", help="where tarballs are put (default: ROOT/packages)")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth emoji (default: 1, all)")
    parser.add_argument("--seed", type=int, default=0, help="of the variations")
    args = parser.parse_args(argv)
    packages = args.packages or args.root / "packages"
    fetch(packages)
    emoji = select(packages)[:: args.every]
    draw(packages, emoji, args.root / "images", args.seed)
    write(emoji, args.root / "data", args.seed)
    kinds = len({one.kind for one in emoji})
    say(f"{args.root}: {len(emoji)} emoji of {kinds} kinds, {len(IMAGES)} vendors; {HELD_OUT} is held out")


def select(packages: Path) -> list[Emoji]:
    """The emoji of `KINDS` that all vendors have and CLDR names."""
    listed = read_json(packages / IMAGES[HELD_OUT].tarball, "emoji.json")
    texts = read_json(packages / ANNOTATIONS.tarball, "annotations/en/annotations.json")
    texts = texts["annotations"]["annotations"]
    found = []
    for entry in listed:
        said = texts.get(characters(entry["unified"]))
        if said and entry["subcategory"] in KINDS and all(entry[f"has_img_{vendor}"] for vendor in IMAGES):
            (name,) = said["tts"]
            keywords = tuple(word for word in said["default"] if word != name)
            found.append(Emoji(Path(entry["image"]).stem, name, KINDS[entry["subcategory"]], keywords))
    if len({one.name for one in found}) < len(found) or not found:
        raise UserError(f"{packages}: {len(found)} emoji, and their names are not unique")
    return found


def characters(code: str) -> str:
    """`1F43F-FE0F` as CLDR writes it: without the selector of a presentation."""
    return "".join(chr(int(point, 16)) for point in code.split("-") if point != "FE0F")


def draw(packages: Path, emoji: Sequence[Emoji], directory: Path, seed: int) -> None:
    """Writes all drawings on white, and the variations of those that are trained on."""
    for vendor in IMAGES:
        (directory / vendor).mkdir(parents=True, exist_ok=True)
        files = {f"img/{vendor}/64/{one.id}.png": one for one in emoji}
        contents = read_files(packages / IMAGES[vendor].tarball, files)
        for name, content in track(contents, f"images of {vendor}", len(files)):
            one = files[name]
            drawing = on_white(Image.open(io.BytesIO(content)).convert("RGBA"))
            drawing.save(directory / one.image(vendor))
            for number in range(1, VARIATIONS if vendor in TRAINED else 1):
                order = random.Random(f"{seed} {one.image(vendor, number)}")
                variation(drawing, order).save(directory / one.image(vendor, number))


def write(emoji: Sequence[Emoji], directory: Path, seed: int) -> None:
    """Writes what follows works on.

    `emoji.json` has the emoji, `captions.jsonl` an image and its name a line (stage 1), `contexts.jsonl` an image and
    what is known of it (from which stage 2's conversations are made), `questions.jsonl` the test.
    """
    directory.mkdir(parents=True, exist_ok=True)
    images = [(one, vendor, n) for n in range(VARIATIONS) for one in emoji for vendor in TRAINED]
    random.Random(seed).shuffle(images)
    write_lines(
        directory / "captions.jsonl",
        ({"image": one.image(vendor, n), "caption": capitalized(one.name)} for one, vendor, n in images),
    )
    write_lines(
        directory / "contexts.jsonl",
        ({"image": one.image(vendor, n), "captions": facts(one, vendor, n)} for one, vendor, n in images),
    )
    write_lines(directory / "questions.jsonl", questions(emoji, seed))
    with atomic_file(directory / "emoji.json") as file:
        file.write(json.dumps([one._asdict() for one in emoji], ensure_ascii=False, indent=1).encode() + b"\n")


def read(root: Path) -> list[Emoji]:
    """The emoji in `data/emoji.json`."""
    entries = json.loads((root / "data/emoji.json").read_text())
    return [Emoji(**entry)._replace(keywords=tuple(entry["keywords"])) for entry in entries]


def facts(one: Emoji, vendor: str, number: int) -> list[str]:
    """What is known about an image, for the model that writes conversations."""
    kind = f"It is {ARTICLES[one.kind]} {one.kind}."
    words = [f"People think of it with the words: {', '.join(one.keywords)}."] if one.keywords else []
    return [f"The emoji is called: {one.name}.", kind, *words, f"Drawing {number} by {vendor}."]


def questions(emoji: Sequence[Emoji], seed: int) -> Iterator[dict[str, Any]]:
    """Of each emoji its name, its kind, and whether it has a name, which is its own for every second emoji."""
    order = random.Random(seed)
    for number, one in enumerate(emoji):
        image = one.image(HELD_OUT)
        yield question(one, image, NAME, ASK_NAME, one.name)
        yield question(one, image, KIND, ASK_KIND, one.kind)
        own = number % 2 == 0
        asked = one if own else another(one, emoji, order)
        yield question(one, image, YES_OR_NO, ASK_WHETHER.format(name=asked.name), "yes" if own else "no")


def question(one: Emoji, image: str, category: str, text: str, answer: str) -> dict[str, Any]:
    return {"question_id": one.id, "image": image, "text": text, "answer": answer, "category": category}


def another(one: Emoji, emoji: Sequence[Emoji], order: random.Random, alike: float = 0.5) -> Emoji:
    """Another emoji, with probability `alike` of the same kind."""
    others = [other for other in emoji if other != one]
    of_kind = [other for other in others if other.kind == one.kind]
    return order.choice(of_kind if of_kind and order.random() < alike else others)


def capitalized(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def write_lines(file: Path, values: Iterable[dict[str, Any]]) -> None:
    with atomic_file(file) as out:
        for value in values:
            out.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")


if __name__ == "__main__":
    run(main)
