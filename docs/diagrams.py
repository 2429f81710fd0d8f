"""Draws the diagrams of docs/how.md from the code that they explain: `python docs/diagrams.py` (needs `make install`).

Token ids, plans and shards are computed by the package, for a small conversation, a small data set and LLaVA-1.5-7B.
"""

import dataclasses
import importlib.util
import shutil
import tempfile
from html import escape
from pathlib import Path

import numpy as np

IMAGES = Path(__file__).with_name("images")
STYLE = """text { font: 13px system-ui, sans-serif; fill: #24292f } .small { font-size: 11px }
.target { fill: #2da44e55 } .image { fill: #8250df40 } .masked { fill: #8c959f30 } .free { fill: none; stroke: #8c959f }
.a { fill: #0969da50 } .b { fill: #bf870050 } .c { fill: #1a7f3750 } .d { fill: #cf222e40 } .e { fill: #8250df50 }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } }"""
COLOURS = "abcde"
WIDTH = 760


@dataclasses.dataclass
class Drawing:
    """An SVG under construction."""

    title: str
    parts: list[str] = dataclasses.field(default_factory=list)
    height: float = 0.0

    def box(self, x: float, y: float, width: float, height: float, kind: str, text: str = "") -> None:
        self.parts.append(
            f'<rect class="{kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height}" rx="3"/>'
        )
        if text:
            self.text(x + width / 2, y + height / 2 + 4, text, "middle")
        self.height = max(self.height, y + height)

    def text(self, x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> None:
        shown = escape(text)
        self.parts.append(f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{shown}</text>')
        self.height = max(self.height, y + 6)

    def svg(self) -> str:
        head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {self.height + 8:.0f}" role="img">'
        lines = [head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", *self.parts, "</svg>"]
        return "\n".join(lines) + "\n"


def masks() -> Drawing:
    """The tokens of a conversation, and which are targets."""
    from llava_jax.data.inspect import token_strings
    from llava_jax.data.samples import Sample
    from llava_jax.data.templates import TEMPLATES
    from llava_jax.data.tokenization import IGNORE_INDEX, IMAGE_TOKEN_INDEX, encode_sample, load_tokenizer

    turns = (
        ("user", "<image>\nWhat is it?"),
        ("assistant", "A red cup."),
        ("user", "Is it full?"),
        ("assistant", "No."),
    )
    with tempfile.TemporaryDirectory() as directory:
        (package,) = importlib.util.find_spec("mistral_common").submodule_search_locations
        shutil.copy(f"{package}/data/tokenizer.model.v1", f"{directory}/tokenizer.model")
        tokenizer = load_tokenizer(directory)
        encoded = encode_sample(Sample("1", ("cup.jpg",), turns), TEMPLATES["v1"], tokenizer)
    drawing, x, y = (
        Drawing("The tokens of a conversation in template v1; the answers and their ends are targets"),
        0.0,
        0,
    )
    names = token_strings(encoded, tokenizer)
    for token, label, name in zip(encoded.input_ids, encoded.labels, names, strict=True):
        image = token == IMAGE_TOKEN_INDEX
        kind = "image" if image else "masked" if label == IGNORE_INDEX else "target"
        shown = "576 features of the image" if image else name.replace("<0x0A>", "\\n")
        width = 10 + 7.6 * len(shown)
        if x + width > WIDTH:
            x, y = 0.0, y + 30
        drawing.box(x, y, width, 24, kind, shown)
        x += width + 4
    for number, (kind, text) in enumerate(
        (("masked", "prompt: no loss"), ("image", "image: no loss"), ("target", "target tokens"))
    ):
        drawing.box(number * 180, y + 44, 18, 18, kind)
        drawing.text(number * 180 + 26, y + 58, text)
    return drawing


def rows() -> Drawing:
    """A group of packed rows with its image slots."""
    from llava_jax.data.packing import Room, pack

    rng = np.random.default_rng(3)
    images = (rng.random(60) < 0.85).astype(np.int64)
    tokens = np.clip(rng.lognormal(5.2, 0.7, 60).astype(np.int64), 40, 1200) + 576 * images
    room = Room(row_length=4096, rows_per_group=4, image_slots=18)
    group, scale = pack(tokens, images, room)[0], (WIDTH - 60) / room.row_length
    drawing = Drawing("A group of four packed rows, and the image slots that they share")
    slots = []
    for number, row in enumerate(group):
        x, y = 60.0, number * 34
        drawing.text(0, y + 18, f"row {number}")
        drawing.box(60, y, WIDTH - 60, 26, "free")
        for place, sample in enumerate(row):
            kind, width = COLOURS[place % len(COLOURS)], tokens[sample] * scale
            drawing.box(x, y, width, 26, kind, str(tokens[sample]))
            slots += [(number, kind)] * int(images[sample])
            x += width
    y, width = len(group) * 34 + 12, (WIDTH - 60) / room.image_slots
    drawing.text(0, y + 18, "slots")
    for number in range(room.image_slots):
        row, kind = slots[number] if number < len(slots) else ("", "free")
        drawing.box(60 + number * width, y, width - 4, 26, kind, str(row))
    return drawing


def shards() -> Drawing:
    """How the parameters of a decoder layer are sharded over fsdp and tensor."""
    from llava_jax.models.config import PRESETS
    from llava_jax.models.llava import abstract_params
    from llava_jax.parallel.sharding import RULES, logical_axes

    shapes = abstract_params(PRESETS["llava-v1.5-7b"])
    layer = [name for name in shapes if name.startswith("llm.layers.") and name.endswith(".kernel")]
    drawing, y = Drawing("Parameters of LLaVA-1.5-7B, and the mesh axis that shards each of their axes"), 0
    for name in ["llm.embed_tokens.embedding", *layer, "llm.lm_head.kernel", "projector.linear_1.kernel"]:
        shape, logical = shapes[name].shape, logical_axes(name)
        free, cells, taken = {"fsdp", "tensor"}, [], [None] * (len(shape) - len(logical)) + list(logical)
        for size, axis in zip(shape, taken, strict=True):
            chosen = next((mesh for mesh in RULES[axis] if mesh in free), None)
            free.discard(chosen)
            cells.append(
                (f"{size:,}" + (f" / {chosen}" if chosen else ""), {"fsdp": "a", "tensor": "b"}.get(chosen, "masked"))
            )
        drawing.text(0, y + 17, name)
        for number, (text, kind) in enumerate(cells):
            drawing.box(330 + number * 142, y, 136, 24, kind, text)
        y += 30
    return drawing


def main() -> None:
    for draw in (masks, rows, shards):
        drawing = draw()
        file = IMAGES / f"{draw.__name__}.svg"
        file.write_text(drawing.svg(), encoding="utf-8")
        print(f"{file}: {drawing.title}")


if __name__ == "__main__":
    main()
