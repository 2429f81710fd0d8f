"""Imports: weights of transformers or of the original LLaVA to a checkpoint.

The `config.json` and the tensors of a directory decide what it holds, never its name. Tensors keep their types and
bits, and each of them has to be known. Weights are read after all of that has been checked, one tensor at a time.
"""

import contextlib
import dataclasses
import functools
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from llava_jax.checkpoint.array_store import is_layered
from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import DtypeOf, ShardingOf, as_stored, first_device
from llava_jax.checkpoint.writing import Slice, refuse_existing, write_model
from llava_jax.cli import UserError, say, track, warn
from llava_jax.convert.adapter import is_adapter, open_adapter, trained_with, unmerged
from llava_jax.convert.found import Found, Options
from llava_jax.convert.hf_tokenizer import choose_special_tokens
from llava_jax.convert.hub import Located, locate
from llava_jax.convert.import_hf import find_adapted_llava, find_backbones, find_llava
from llava_jax.convert.import_original import find_original, is_original
from llava_jax.convert.language_model import read_if_there
from llava_jax.convert.names import entries_of, slices
from llava_jax.convert.stored_tensor import read_ahead
from llava_jax.data.template_fit import chosen_template, missing_marks, require_fit
from llava_jax.data.templates import IM_END_TOKEN, IM_START_TOKEN, Template, choose_template
from llava_jax.data.tokenization import load_tokenizer, require_tokens
from llava_jax.files.reading import read_object
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import Params, Shapes, abstract_params, build_projector, module_params
from llava_jax.models.lora import PARAMETER
from llava_jax.models.quantized import PART, linear_of, quantize
from llava_jax.remote import new_local


def import_backbones(llm: str, vision: str, projector: str | None, output: str, options: Options) -> LlavaConfig:
    """Joins a language model and a vision tower with a projector from a file, or a fresh one.

    Raises UserError that lists all missing, unexpected and misshapen tensors.
    """
    refuse_existing(output)
    places = _located(llm=llm, vision=vision)
    if projector and not Path(projector).is_file():
        raise UserError(f"{projector}: no such file")
    file = Path(projector) if projector else None
    return _save(find_backbones(places["llm"].path, places["vision"].path, file, options), output, options, places)


def import_llava(
    directory: str, output: str, options: Options, base: str | None = None, vision: str | None = None
) -> LlavaConfig:
    """Imports a LLaVA of transformers or of the original, with a `base` or a vision tower if it is not complete.

    Raises UserError as `import_backbones` does.
    """
    refuse_existing(output)
    places = _located(llava=directory, base=base, vision=vision)
    options = _as_trained(options, places["llava"].path)
    return _save(_find(places, options), output, options, places)


@dataclasses.dataclass(frozen=True)
class ImportedModel:
    """A LLaVA in a layout of Hugging Face, read as a `checkpoint.reading.Checkpoint` is; no checkpoint is written."""

    found: Found
    description: Description
    tokenizer_dir: Path

    @property
    def config(self) -> LlavaConfig:
        return self.description.model

    @property
    def template(self) -> str:
        return self.description.template

    def dequantized(self) -> "ImportedModel":
        """As that of a checkpoint: this is a plain model."""
        return self

    def load(self, dtype: DtypeOf = as_stored, sharding: ShardingOf = first_device) -> Params:
        """All parameters, converted one by one. Arguments as those of `Checkpoint.load`."""
        shapes, slices_of_all = _parameters(self.found, seed=0)
        params: Params = {}
        for name, layer, values in slices_of_all:
            target = dtype(name, shapes[name].dtype)
            if layer is None:
                array = values.astype(target)
            else:
                array = np.empty(shapes[name].shape, target) if layer == 0 else array
                array[layer] = values
            if layer is None or layer == len(array) - 1:
                params[name] = jax.device_put(array, sharding(name))
        return {name: params[name] for name in abstract_params(self.config)}


def open_llava(source: str) -> ImportedModel:
    """What `import_llava` imports, with the options that the source says, without writing a checkpoint.

    `source`: a directory, or a name on the Hugging Face Hub, which is downloaded to its cache. Raises UserError as
    `import_backbones` does; no weights are read yet.
    """
    places = {"llava": locate(source, "load")}
    scratch = new_local()
    return ImportedModel(*_described(_find(places, Options()), scratch, Options(), places), scratch)


def _as_trained(options: Options, path: Path) -> Options:
    """The options, with those that an adapter was trained with where the user gave none."""
    if (trained := trained_with(path)) is None:
        return options
    template = choose_template(options.template, trained.template).name
    if not options.template:
        say(f"{path}: template {template}, which it was trained with; --template NAME chooses another", file=sys.stderr)
    position, aspect = options.image_position or trained.image_position, options.aspect or trained.image_aspect
    return dataclasses.replace(options, template=template, image_position=position, aspect=aspect)


def _find(places: dict[str, Located], options: Options) -> Found:
    found, path = _find_merged(places, options), places["llava"].path
    if options.grid_order and not found.config.anyres:
        raise UserError(f"{path}: is no model with AnyRes: leave --grid-order out")
    if not options.unmerged:
        return found
    if not is_adapter(path):
        raise UserError(f"{path}: no adapter of PEFT: leave --unmerged out")
    lora, tensors = unmerged(open_adapter(path), found.config)
    config = dataclasses.replace(found.config, lora=lora)
    held = {entry.name for part, all_of in entries_of(config).items() for entry in all_of
            if any((part, leaf) in tensors for leaf in entry.leaves())}  # fmt: skip
    sources = {
        part: source.replaced({place: tensor for place, tensor in tensors.items() if place[0] == part})
        for part, source in found.sources.items()
    }
    whole = tuple(sorted(name for name in held if not PARAMETER.fullmatch(name)))
    return dataclasses.replace(found, config=config, sources=sources, trained_whole=whole)


def _find_merged(places: dict[str, Located], options: Options) -> Found:
    path, base, vision = (places[name].path if name in places else None for name in ("llava", "base", "vision"))
    adapter = is_adapter(path)
    # An adapter of a LLaVA of transformers usually comes without the model's config.json.
    if is_original((read_if_there if adapter else read_object)(path / "config.json")):
        return find_original(path, base, vision, options)
    if vision and adapter:
        raise UserError(f"{path}: an adapter of a LLaVA of transformers, which has a tower: leave --vision out")
    if adapter:
        return find_adapted_llava(path, base, options)
    if base or vision:
        raise UserError(f"{path}: a LLaVA of transformers, which is complete: leave --base and --vision out")
    return find_llava(path, options)


def _located(**sources: str | None) -> dict[str, Located]:
    return {name: locate(source, f"--{name}") for name, source in sources.items() if source}


def _save(found: Found, output: str, options: Options, places: dict[str, Located]) -> LlavaConfig:
    with tempfile.TemporaryDirectory() as scratch:
        found, description = _described(found, Path(scratch), options, places)
        shapes, values = _parameters(found, options.seed)
        if options.base_dtype:
            model = dataclasses.replace(found.config, base_dtype=options.base_dtype)
            description = dataclasses.replace(description, model=model)
            shapes, values = _quantized(model, shapes, values)
        write_model(output, shapes, values, description, scratch)
    return found.config


def _quantized(model: LlavaConfig, shapes: Shapes, slices_of_all: Iterator[Slice]) -> tuple[Shapes, Iterator[Slice]]:
    """The same parameters, with the kernels quantized that a quantized model has in parts, one layer at a time."""
    wanted = abstract_params(model)
    parts = {name: leaf for name, leaf in wanted.items() if PART.fullmatch(name)}
    kept = {name: leaf for name, leaf in shapes.items() if name in wanted}

    def quantized() -> Iterator[Slice]:
        vectors: dict[str, list[np.ndarray]] = {}  # of a layer; these are stored as a whole
        for name, layer, values in slices_of_all:
            if name in wanted:
                yield name, layer, values
                continue
            for part, value in quantize(values, model.base_dtype).items():
                target, value = f"{linear_of(name)}.{part}", np.asarray(value)
                if is_layered(target, value.ndim + 1):
                    yield target, layer, value
                else:
                    vectors.setdefault(target, []).append(value)
                    if len(vectors[target]) == model.text.num_layers:
                        yield target, None, np.stack(vectors.pop(target))

    return kept | parts, quantized()


def _described(found: Found, scratch: Path, options: Options, places: dict[str, Located]) -> tuple[Found, Description]:
    """Writes the tokenizer to `scratch`; -> the model as it fits that tokenizer, and its description."""
    with _named(os.fspath(scratch), places):
        found.write_tokenizer(scratch)
        tokenizer = load_tokenizer(scratch)
        found = _fitting(found, tokenizer, options.rows == "tokenizer")
        if options.image_position:
            config = dataclasses.replace(found.config, image_position=options.image_position)
            found = dataclasses.replace(found, config=config)
        template = _template(options.template, tokenizer, os.fspath(scratch))
    origins = {name: place.origin for name, place in places.items() if place.origin}
    stage = "finetune" if found.trained else None
    return found, Description(
        found.config, template.name, found.hf, stage=stage, origins=origins, trained_whole=found.trained_whole
    )


def _template(requested: str | None, tokenizer: PreTrainedTokenizerBase, where: str) -> Template:
    """The requested template, or that of the tokenizer, or v1, with which LLaVA-1.5 was trained.

    Raises UserError if it cannot be used with the tokenizer; warns if its marks are not single tokens.
    """
    template = chosen_template(requested, tokenizer, where, default="v1")
    require_fit(template, tokenizer)
    if problem := missing_marks(template, tokenizer):
        if not requested:
            raise UserError(f"{problem}: --template NAME")
        warn(problem)
    return template


@contextlib.contextmanager
def _named(scratch: str, places: dict[str, Located]) -> Iterator[None]:
    """Makes errors name the sources of a tokenizer instead of the directory that it is copied to."""
    sources = " or ".join(str(place.path) for name, place in places.items() if name != "vision")
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace(scratch, sources)) from error


def _fitting(found: Found, tokenizer: PreTrainedTokenizerBase, fit_rows: bool) -> Found:
    """Checks that the model fits its tokenizer; with `fit_rows`, gives it one row for each id of the tokenizer."""
    if found.config.im_start_end:
        require_tokens(tokenizer, IM_START_TOKEN, IM_END_TOKEN)
    rows, needed = found.config.text.vocab_size, 1 + max(tokenizer.get_vocab().values())
    if fit_rows:
        sources = {part: source.resized(needed) for part, source in found.sources.items()}
        text = dataclasses.replace(found.config.text, vocab_size=needed)
        found = dataclasses.replace(found, sources=sources, config=dataclasses.replace(found.config, text=text))
    elif needed > rows:
        raise UserError(
            f"the tokenizer has ids up to {needed - 1}, the model {rows} rows: give the model its own tokenizer, or "
            "--rows tokenizer, with which new rows are the mean of the others"
        )
    try:
        choose_special_tokens(tokenizer, found.config.text.vocab_size, found.hf["config"].get("image_token_index"))
    except UserError as error:
        warn(f"this model cannot be exported: {error}")
    return found


def _parameters(found: Found, seed: int) -> tuple[Shapes, Iterator[Slice]]:
    """Shapes and types of all parameters, and their values, which are read one slice after the other."""
    parts = entries_of(found.config)
    entries = [(part, entry) for part in found.sources for entry in parts.get(part, ())]
    fresh: Params = {}
    if "projector" not in found.sources:  # a new one for stage 1, float32
        projector = build_projector(found.config, nnx.Rngs(params=jax.random.key(seed)))
        fresh = {f"projector.{name}": value for name, value in module_params(projector).items()}
    wanted = abstract_params(found.config)
    shapes = {
        entry.name: found.sources[part].abstract(part, entry, wanted[entry.name].shape) for part, entry in entries
    } | {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in fresh.items()}

    reads = [
        ((entry.name, layer), read)
        for part, entry in entries
        for layer, read in slices(entry, functools.partial(found.sources[part].get, part))
    ] + [((name, None), functools.partial(np.asarray, value)) for name, value in fresh.items()]
    values = track(read_ahead(read for _, read in reads), "converting weights", len(reads))
    return shapes, ((*place, array) for (place, _), array in zip(reads, values, strict=True))
