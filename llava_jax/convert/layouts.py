"""The names of tensors in files: layouts of transformers and of the original LLaVA, mapped to (part, leaf name).

A LLaVA of transformers has had four layouts, in memory and on disk:

    transformers               decoder                  head                     tower
    on disk up to 5.0; the hub language_model.model.*   language_model.lm_head   vision_tower.vision_model.*
    in memory 4.52 ... 5.5     model.language_model.*   lm_head                  model.vision_tower.vision_model.*
    in memory from 5.6         model.language_model.*   lm_head                  model.vision_tower.*
    on disk, fresh by 5.23     language_model.model.*   language_model.lm_head   vision_tower.*

All versions read the first one, so exports have it. Imports accept each of them, tensor by tensor, and the layout of
the original LLaVA: a LLaMA with `model.mm_projector` and, in some, `model.vision_tower.vision_tower.vision_model`.
"""

import collections
import copy
import re
from collections.abc import Callable, Iterable

import jax
import numpy as np

from llava_jax.cli import UserError
from llava_jax.convert.names import entries_of
from llava_jax.convert.stored_tensor import NUMBERS, WEIGHTS, StoredTensor, Tensors, with_rows
from llava_jax.models.config import LlavaConfig
from llava_jax.models.hf_names import Entry
from llava_jax.models.llava import abstract_params

# Pattern of a full name -> the part of the model; the group is the leaf name. The first pattern that matches counts.
Layout = dict[str, str]
Place = tuple[str, str]  # a part of the model, and a leaf name
LLAVA: Layout = {
    r"(?:language_model\.model|model\.language_model)\.(.+)": "llm",
    r"(?:language_model\.)?(lm_head\.weight)": "head",
    r"(?:model\.)?multi_modal_projector\.(.+)": "projector",
    r"(?:model\.)?(image_newline)": "newline",
    r"(?:model\.)?vision_tower\.(?:vision_model\.)?(.+)": "vision",
}
LLAMA: Layout = {r"(lm_head\.weight)": "head", r"(?:model\.)?(.+)": "llm"}
CLIP: Layout = {r"(?:vision_model\.)?(.+)": "vision"}
ORIGINAL: Layout = {
    r"(lm_head\.weight)": "head",
    r"model\.mm_projector\.(.+)": "projector",
    r"model\.(image_newline)": "newline",
    r"model\.vision_tower\.vision_tower\.(?:vision_model\.)?(.+)": "vision",
    r"model\.(.+)": "llm",
}
# An adapter has the names of the model that it was trained with: any of the above.
ADAPTED: Layout = (
    {name: part for name, part in ORIGINAL.items() if part in ("projector", "newline", "vision")} | LLAVA | ORIGINAL
)
PROJECTOR: Layout = {r"(?:model\.)?(?:multi_modal_projector|mm_projector)\.(.+)": "projector"}

# Prefixes of the leaf names in an export; some towers have another one, see `Tower.hf_prefix`.
EXPORT_PREFIXES = {
    "llm": "language_model.model.",
    "head": "language_model.",
    "projector": "multi_modal_projector.",
    "newline": "",
    "vision": "vision_tower.vision_model.",
}

# Tensors that are ignored: constants that old versions stored, and those of a CLIP or SigLIP outside its vision tower.
# `Tower.ignored` has those inside a tower.
CONSTANTS = (r".*\brotary_emb\.inv_freq", r".*\bembeddings\.position_ids")
CLIP_REST = (r"text_model\..+", r"text_projection\.weight", r"visual_projection\.weight", r"logit_(?:scale|bias)")

_ORIGINAL_LINEAR = re.compile(r"(?:(\d+)\.)?(weight|bias)")  # of the original LLaVA's projector, an nn.Sequential


EMBEDDINGS = ("llm", "embed_tokens.weight")
TIED_HEAD = ("head", "lm_head.weight")  # may be stored although it equals the embeddings


class Source:
    """The tensors of some parts of a model by (part, leaf name), independent of the layout of the files."""

    def __init__(self, tensors: Tensors, layout: Layout, dropped: Iterable[str] = CONSTANTS):
        self._tensors = tensors
        self._names: dict[Place, str] = {}  # (part, leaf) -> name in the files
        self._problems = []
        for name in tensors:
            if any(re.fullmatch(pattern, name) for pattern in dropped):
                continue
            place = place_of(name, layout)
            if place is None:
                self._problems.append(f"unexpected {name}")
            elif place in self._names:
                self._problems.append(f"{name} and {self._names[place]} are the same tensor")
            else:
                self._names[place] = name

    def __contains__(self, place: Place) -> bool:
        return place in self._names

    def leaves(self, part: str) -> list[str]:
        return [leaf for held, leaf in self._names if held == part]

    def shape(self, part: str, leaf: str) -> tuple[int, ...]:
        return self._tensors[self._names[part, leaf]].shape

    def get(self, part: str, leaf: str) -> np.ndarray:
        return self._tensors[self._names[part, leaf]].read()

    def abstract(self, part: str, entry: Entry, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        """Our parameter, which has this shape, in the type of its tensors.

        Raises UserError if their types differ, since stacking them would convert some.
        """
        dtypes = {self._tensors[self._names[part, leaf]].dtype: leaf for leaf in entry.leaves()}
        if len(dtypes) > 1:
            kinds = ", ".join(f"{leaf} is {dtype}" for dtype, leaf in dtypes.items())
            raise UserError(f"layers of different types: {kinds}; save the model in one type")
        return jax.ShapeDtypeStruct(shape, NUMBERS[next(iter(dtypes))])

    def resized(self, rows: int) -> "Source":
        """The same with `rows` rows of the embeddings and the head."""
        resized = copy.copy(self)
        names = [self._names[place] for place in (EMBEDDINGS, TIED_HEAD) if place in self._names]
        resized._tensors = self._tensors | {name: with_rows(self._tensors[name], rows) for name in names}
        return resized

    def replaced(self, tensors: dict[Place, StoredTensor]) -> "Source":
        """The same with these tensors, besides its own or instead of them."""
        replaced = copy.copy(self)
        names = {place: self._names.get(place, ".".join(place)) for place in tensors}
        replaced._names = self._names | names
        replaced._tensors = self._tensors | {names[place]: tensor for place, tensor in tensors.items()}
        return replaced

    def problems(self, config: LlavaConfig, parts: Iterable[str]) -> list[str]:
        """The missing, unexpected and misshapen tensors of these parts, and those of types that weights do not have."""
        shapes = abstract_params(config)
        entries = entries_of(config)
        expected = {
            (part, leaf): entry.hf_shape(shapes[entry.name].shape)
            for part in parts
            for entry in entries.get(part, ())
            for leaf in entry.leaves()
        }
        problems = list(self._problems)
        problems += [f"missing {self._prefix(part)}{leaf}" for part, leaf in expected if (part, leaf) not in self]
        for place, name in self._names.items():
            if place in expected:
                problems += self._tensor_problems(name, expected[place])
            elif not (place == TIED_HEAD and config.text.tie_word_embeddings):
                problems.append(f"unexpected {name}")
        return problems

    def _tensor_problems(self, name: str, expected: tuple[int, ...]) -> list[str]:
        shape, dtype, _ = self._tensors[name]
        misshapen = [f"{name} is {shape}, not {expected}"] if shape != expected else []
        return misshapen + ([f"{name} is {dtype}, not {', '.join(WEIGHTS)}"] if dtype not in WEIGHTS else [])

    def _prefix(self, part: str) -> str:
        """The prefix of most leaf names of a part in this source, for messages; the part's name if there is none."""
        places = [(name, leaf) for (held, leaf), name in self._names.items() if held == part]
        found = collections.Counter(name.removesuffix(leaf) for name, leaf in places if name.endswith(leaf))
        return found.most_common(1)[0][0] if found else f"{part} " * bool(places)


def finder(tensors: Tensors, layout: Layout) -> Callable[[str], str]:
    """A function from a name in any version of the layout to that in `tensors`; names they lack stay as they are."""
    names = {place: name for name in tensors if (place := place_of(name, layout))}
    return lambda name: names.get(place_of(name, layout), name)


def place_of(name: str, layout: Layout) -> Place | None:
    for pattern, part in layout.items():
        match = re.fullmatch(pattern, name)
        if match:
            leaf = match[1]
            return part, _linear_name(leaf) if part == "projector" else leaf
    return None


def _linear_name(leaf: str) -> str:
    """`weight` -> `linear_1.weight`, `2.bias` -> `linear_2.bias`: every second module of the original is a GELU."""
    match = _ORIGINAL_LINEAR.fullmatch(leaf)
    if not match or int(match[1] or 0) % 2:
        return leaf
    return f"linear_{int(match[1] or 0) // 2 + 1}.{match[2]}"
