"""The samples and rejects that a report shows: drawn at random, with small images, captions and boxes."""

import collections
import hashlib
import heapq
import itertools
import json
from collections.abc import Iterator, Sequence
from typing import Any

from etils import epath

from llava_jax.cli import UserError, short, track
from llava_jax.data.image_folder import MAX_LENGTH, image_path
from llava_jax.data.images import load_image, thumbnail
from llava_jax.data.sources import Sample
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.datagen import contexts
from llava_jax.datagen.contexts import Context
from llava_jax.datagen.statistics import Facts, kind_of
from llava_jax.llm_api.ledger import Ledger

THUMBNAIL = 288  # pixels of the longer side
QUALITY = 70  # of JPEG
REJECTED, UNSUPPORTED = "rejected", "with unsupported objects"  # in names of groups
TEXT = 20_000  # characters of a sample, and again of its captions
MAX_CHARACTERS = 100_000_000  # of all samples that are shown, images included
MAX_BOXES = 200  # of an image
MAX_IMAGES = 10  # of a sample
GROUPS = 100  # of reasons of rejection; further reasons share one


class Draw:
    """Draws at random from each of several groups, in bounded memory. The same items give the same draw."""

    def __init__(self, count: int):
        self.count = count
        self.sizes: collections.Counter[str] = collections.Counter()
        self._heaps: dict[str, list[tuple[bytes, int, Any]]] = collections.defaultdict(list)

    def put(self, group: str, item: Any) -> None:
        number = self.sizes[group]
        self.sizes[group] += 1
        entry = (hashlib.sha256(f"{group} {number}".encode(errors="surrogatepass")).digest(), number, item)
        heap = self._heaps[group]
        (heapq.heappush if len(heap) < self.count else heapq.heappushpop)(heap, entry)

    def put_reject(self, reject: dict[str, Any]) -> None:
        group = f"{REJECTED}: {short(str(reject.get('reason')))}"
        self.put(group if group in self.sizes or len(self.sizes) < GROUPS else f"{REJECTED}: others", reject)

    def drawn(self) -> Iterator[tuple[str, Any]]:
        """Yields group and item, from each group in turn."""
        groups = [[(group, item) for _, _, item in sorted(heap, reverse=True)] for group, heap in self._heaps.items()]
        for row in itertools.zip_longest(*groups):
            yield from filter(None, row)


class Shown:
    """The data of `browser.js`, collected from samples and rejects one by one."""

    def __init__(self, images: epath.PathLike, ledger: Ledger | None, facts: Facts | None, kind: str | None):
        self.images, self.ledger, self.facts, self.kind = images, ledger, facts, kind
        self.entries: list[dict[str, Any]] = []
        self.thumbnails: dict[str, str] = {}  # data URIs
        self.characters = 0

    def add_sample(self, sample: Sample) -> None:
        claims = self.facts.claims(sample) if self.facts else None
        numbers = map(self.facts.number, sample.images[:MAX_IMAGES]) if claims else ()
        several = len(sample.images) > 1  # then their places in the text matter
        turns = [text for role, text in sample.turns if role != "system"]
        self._add(
            id=sample.id,
            images=sample.images,
            group=self.kind or kind_of(sample),
            turns=bounded([text if several else text.replace(IMAGE_TOKEN, "").strip() for text in turns]),
            contexts=[self._context(f"number = {number}") for number in numbers],
            unsupported=bounded(list(claims.unsupported.values())) if claims else [],
            uncovered=bounded(sorted(claims.boxes - claims.covered)) if claims else [],
        )

    def add_reject(self, group: str, reject: dict[str, Any]) -> None:
        ident = str(reject.get("id"))
        self._add(
            id=ident,
            images=[str(reject.get("image") or "")],
            group=group,
            detail=short(str(reject.get("detail") or ""), TEXT),
            answer=short((self.ledger and self.ledger.last_answer(ident)) or "", TEXT),
            contexts=[contexts.get(self.ledger.db, ident)] if self.ledger else [],
            rejected=True,
        )

    def _context(self, where: str) -> Context | None:
        return next(contexts.read(self.ledger.db, where=where), None)

    def _add(self, images: Sequence[str], contexts: Sequence[Context | None], **fields: Any) -> None:
        shown = []
        for image, context in itertools.zip_longest(images[:MAX_IMAGES] or [""], contexts):
            image, boxes = short(image, MAX_LENGTH), context.boxes[:MAX_BOXES] if context else ()
            if image and image not in self.thumbnails:
                try:
                    self.thumbnails[image] = thumbnail(load_image(image_path(self.images, image)), THUMBNAIL, QUALITY)
                except UserError:
                    self.thumbnails[image] = ""  # the page says so
                self.characters += len(self.thumbnails[image])
            boxes = [box._replace(category=short(box.category)) for box in boxes]
            shown.append({"image": image, "boxes": boxes})
        empty = {"detail": "", "answer": "", "turns": [], "unsupported": [], "uncovered": [], "rejected": False}
        captions = [caption for context in contexts if context for caption in context.captions]
        fields |= {"id": short(fields["id"]), "captions": bounded(captions), "more_images": shown[1:]}
        self.entries.append({**empty, **fields, **shown[0]})
        self.characters += len(json.dumps(self.entries[-1]))


def select(draw: Draw, count: int, samples: Sequence[Sample], shown: Shown) -> dict[str, Any]:
    """The data of the browser: up to `count` of the drawn items, which are indices of samples, or rejects."""
    selected = {}
    for group, item in draw.drawn():
        if len(selected) < count:
            selected.setdefault(item if isinstance(item, int) else ("reject", id(item)), (group, item))
    for group, item in track(selected.values(), "images for the report", len(selected)):
        if shown.characters > MAX_CHARACTERS:
            break
        if isinstance(item, int):
            shown.add_sample(samples[item])
        else:
            shown.add_reject(group, item)
    counts = collections.Counter(entry["group"] for entry in shown.entries)
    groups = {name: (counts[name], size) for name, size in draw.sizes.items() if not name.endswith(UNSUPPORTED)}
    if rejected := [sizes for group, sizes in groups.items() if group.startswith(REJECTED)]:
        groups[REJECTED] = tuple(map(sum, zip(*rejected, strict=True)))
    return {"entries": shown.entries, "thumbnails": shown.thumbnails, "groups": groups}


def bounded(texts: Sequence[str]) -> list[str]:
    """The first texts, up to `TEXT` characters together, and a note how many are left out."""
    kept, room = [], TEXT
    for number, text in enumerate(texts):
        if room <= 0:
            return [*kept, f"({len(texts) - number:,} more)"]
        kept.append(short(text, room + 3))
        room -= max(len(text), 100)  # since empty texts take space, too
    return kept
