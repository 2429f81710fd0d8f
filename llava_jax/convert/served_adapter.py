"""Reads the adapters that `chat` and `serve` load: directories of PEFT, and workdirs and checkpoints of LoRA runs."""

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from llava_jax.checkpoint.format import STEPS, Description, Source
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint, refuse_inflated
from llava_jax.cli import UserError, say, warn
from llava_jax.convert.adapter import is_adapter, read_adapter, trained_with
from llava_jax.convert.import_weights import ImportedModel
from llava_jax.data.templates import choose_template
from llava_jax.inference.adapters import AdapterWeights
from llava_jax.inference.prompts import PromptEncoder
from llava_jax.models.batched_lora import LAYERS, PROJECTOR
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import abstract_params, check_names
from llava_jax.models.lora import PARAMETER


def read_for(directory: str, base: Checkpoint | ImportedModel, template: str | None = None) -> AdapterWeights:
    """The adapter in a directory, for an engine with a base that has none.

    Args:
      directory: of PEFT, a workdir (its newest step is taken) or one step.
      base: the model that the adapter was trained on.
      template: of conversations, instead of the one that it was trained with.

    Raises UserError for an adapter of another base, and for one that changes more than linear layers of the language
    model and the projector.
    """
    if base.config.lora is not None:
        raise UserError("the checkpoint has an adapter already: give the one that it was trained on, or merge it first")
    trained: Checkpoint | ImportedModel | None = None  # says how prompts were made in training
    if is_adapter(Path(directory)):
        lora, params = read_adapter(Path(directory), base.config)
        _require_servable(directory, params)
        if said := trained_with(Path(directory)):
            model = dataclasses.replace(base.config, image_position=said.image_position, image_aspect=said.image_aspect)
            description = dataclasses.replace(base.description, model=model, template=said.template)
            trained = dataclasses.replace(base, description=description)
    else:
        checkpoint = trained = open_checkpoint(directory)
        if (lora := checkpoint.config.lora) is None:
            raise UserError(f"{directory}: a checkpoint without an adapter: give it as --checkpoint")
        _require_servable(directory, checkpoint.stored)
        _require_base(directory, checkpoint, base)
        params = _stored(checkpoint)
    return AdapterWeights(lora, params, trained and _prompts(directory, trained, base, template), directory)


def _prompts(
    directory: str, trained: Checkpoint | ImportedModel, base: Checkpoint | ImportedModel, template: str | None
) -> PromptEncoder:
    """As in training, which is reported if the template is not the base's."""
    chosen = choose_template(template, trained.template)
    if template is None and trained.template != base.template:
        what = f"template {trained.template}, which it was trained with; that of the checkpoint is {base.template}"
        say(f"{directory}: {what}", file=sys.stderr)
    return PromptEncoder.from_checkpoint(trained, chosen)


def _require_servable(directory: str, names: dict) -> None:
    for name in names:
        if not (name.startswith(PROJECTOR) or name.startswith(LAYERS) and PARAMETER.fullmatch(name)):
            raise UserError(
                f"{directory}: also changes {name}, which is shared by all adapters of a base: merge it instead "
                f"(python -m llava_jax.convert merge) and give the result as --checkpoint"
            )


def _stored(checkpoint: Checkpoint) -> dict[str, np.ndarray]:
    """The parameters in the checkpoint itself. Its sources are not opened: it could name any file."""
    alone = dataclasses.replace(checkpoint, description=dataclasses.replace(checkpoint.description, sources=()))
    refuse_inflated(alone.weights, alone.stored)
    shapes = abstract_params(checkpoint.config)
    try:
        check_names(alone.stored, {name: shape for name, shape in shapes.items() if name in alone.stored})
    except ValueError as error:
        raise UserError(f"{alone.weights}: does not hold this adapter: {error}") from None
    return {name: alone.read(name) for name in alone.stored}


def _require_base(directory: str, checkpoint: Checkpoint, base: Checkpoint | ImportedModel) -> None:
    """Raises UserError unless every parameter that the adapter does not have is the base's."""
    for name, value in _fields(checkpoint.config).items():
        if value != (other := _fields(base.config).get(name)):
            raise UserError(
                f"{directory}: is for another base: its {name} is {value}, and that of the checkpoint {other}"
            )
    if (rounded := checkpoint.config.base_dtype) != base.config.base_dtype:
        warn(f"{directory}: was trained on weights in {rounded}, and the checkpoint's are not rounded to it")
    own = base.description.id, base.step if isinstance(base, Checkpoint) else None
    expected = {name: origin for origin, source in _origins(base.description) for name in source.names}
    for origin, source in _origins(checkpoint.description):
        if any(expected.get(name, own) != origin for name in source.names if name not in checkpoint.stored):
            raise UserError(
                f"{directory}: was trained on {source.path}, which is not the checkpoint: give that one as "
                "--checkpoint, or export the adapter (python -m llava_jax.convert export --layout peft)"
            )


def _fields(config: LlavaConfig) -> dict[str, object]:
    """The fields in which an adapter has to agree with its base, by dotted name."""
    values = dataclasses.asdict(config)
    parts = {f"{part}.{name}": value for part in ("text", "vision") for name, value in values.pop(part).items()}
    free = {"lora", "base_dtype", "image_aspect", "image_position"}
    return parts | {name: value for name, value in values.items() if name not in free}


def _origins(description: Description) -> Iterator[tuple[tuple[str, int | None], Source]]:
    """The sources, each with what identifies it: all steps of a run have one id."""
    for source in description.sources:
        path = Path(source.path)
        yield (source.id, int(path.name) if path.parent.name == STEPS and path.name.isdecimal() else None), source
