"""The format of checkpoints, which describe themselves.

    D/                   what `convert import` writes: all parameters, in the types of the source
      llava.json           the description below
      tokenizer/           the tokenizer's files
      params/              Orbax
    W/                   a training workdir
      llava.json tokenizer/
      checkpoints/STEP/    Orbax: `params` (the trained ones, float32), their moving average `ema`, if there is one,
                           `optimizer`, and the description
      frozen/ID/           what `convert copy-frozen` writes: parameters of the checkpoint with this `id`

A step holds the trained parameters; the description says which directory holds each frozen one, so that it is stored
once and stays bit-equal. If it holds their average, that is what is read; only a run that resumes reads `params`, too.
Nothing is decided by the name of a path.
"""

import dataclasses
import hashlib
import json
import os
import re
import uuid
from typing import Any

from etils import epath
from orbax.checkpoint import v1 as ocp

from llava_jax.cli import UserError
from llava_jax.files.lock import entries
from llava_jax.files.reading import loads, read_bytes, to_utf8
from llava_jax.files.writing import write_json
from llava_jax.models import hf_fields
from llava_jax.models.config import REGISTER_FIRST, LlavaConfig
from llava_jax.remote import is_remote

DESCRIPTION = "llava.json"
FROZEN = "frozen"  # in a workdir: copies of frozen parameters, by the `id` of the checkpoint that they come from
FORMAT = 1
STEPS = "checkpoints"  # in a workdir
PARAMS, EMA = "params", "ema"  # in a step
DIGEST = "digest"  # of the description, in a step
_ID = re.compile(r"[\w-]{1,64}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Source:
    """Another checkpoint, which holds some of a checkpoint's parameters."""

    path: str  # when the run started
    relative: str  # the same, from the directory of the checkpoint: valid after both have moved
    id: str  # of its description: notices when it was overwritten by another one
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Description:
    """Everything that is needed to use the weights."""

    model: LlavaConfig
    template: str  # of conversations, see `data.templates`
    hf: dict[str, Any] = dataclasses.field(default_factory=dict)  # the source's JSON files, kept for export
    sources: tuple[Source, ...] = ()
    stage: str | None = None  # of training; None if the parts of the model have not been trained together
    origins: dict[str, str] = dataclasses.field(default_factory=dict)  # flag of the import -> name on the Hub @ commit
    # Of a model with adapters that has no sources: the other parameters that are not those of the adapters' base. None
    # if that is not known, as of checkpoints from before this was stored.
    trained_whole: tuple[str, ...] | None = None
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def to_json(self) -> dict[str, Any]:
        # Through text, so that tuples become lists as in a file.
        return json.loads(json.dumps({"format": FORMAT} | dataclasses.asdict(self) | {"model": self.model.to_dict()}))

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "Description":
        values = dict(values)
        if values.pop("format", None) != FORMAT:
            raise UserError(f"{where}: not a llava_jax checkpoint of format {FORMAT}; import or train it again")
        values["model"] = LlavaConfig.from_dict(values["model"])
        values["sources"] = tuple(Source(**s | {"names": tuple(s["names"])}) for s in values["sources"])
        if (whole := values.get("trained_whole")) is not None:
            values["trained_whole"] = tuple(whole)
        description = cls(**values)
        description._check(where)
        return description

    def _check(self, where: str) -> None:
        """Raises an error for fields of wrong types, before they are used."""
        fields = dataclasses.asdict(self)
        hf, origins = hf_fields.part(fields, "hf", where), hf_fields.part(fields, "origins", where)
        config = hf_fields.part(hf, "config", f"{where}: hf")
        generation = hf_fields.part(hf, "generation_config", f"{where}: hf")
        hf_fields.check_generation(generation, f"{where}: hf.generation_config")
        hf_fields.get(config, "image_token_index", 0, f"{where}: hf.config")
        for name in ("text_config", "vision_config"):
            inner = hf_fields.part(config, name, f"{where}: hf.config")
            hf_fields.get(inner, "model_type", "", f"{where}: hf.config.{name}")
        texts = [self.template, self.stage or "", *origins.values(), *(self.trained_whole or ())]
        texts += [text for source in self.sources for text in (source.path, source.relative, *source.names)]
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ValueError("template, stage, origins, trained_whole and sources are not all texts")
        if not all(_ID.fullmatch(id) for id in (self.id, *(source.id for source in self.sources))):  # names of folders
            raise ValueError("id is not made of 1 to 64 letters, digits, _ and -")


def digest(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]


def read_description(directory: epath.Path) -> Description:
    file = directory / DESCRIPTION
    text = to_utf8(read_bytes(file), file)
    try:
        return Description.from_json(loads(text, strict=False), where=str(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        problem = str(error) if REGISTER_FIRST in str(error) else f"damaged description ({error!r}); import it again"
        raise UserError(f"{file}: {problem}") from None


def write_description(directory: epath.Path, description: Description) -> None:
    write_json(directory / DESCRIPTION, description.to_json())


def finished_steps(directory: epath.Path) -> list[int]:
    """The steps with a complete checkpoint, oldest first; none if there is no such directory."""
    steps = (int(entry.name) for entry in entries(directory) if entry.name.isdecimal())
    return sorted(step for step in steps if ocp.is_orbax_checkpoint(directory / str(step)))


def frozen_copy(workdir: epath.Path, source: Source) -> epath.Path:
    """The directory in a workdir for a copy of the parameters that it takes from a source."""
    return workdir / FROZEN / source.id


def has_copy(workdir: epath.Path, source: Source) -> bool:
    return (frozen_copy(workdir, source) / DESCRIPTION).exists()  # which is written last


def needed(workdir: epath.Path, description: Description) -> list[str]:
    """The paths of the checkpoints outside a workdir that its steps take parameters from."""
    return [source.path for source in description.sources if not has_copy(workdir, source)]


def absolute(path: str | os.PathLike) -> epath.Path:
    """The path, local or remote (`gs://`), as an absolute one: Orbax takes no other.

    Raises UserError for an address of another kind, such as https://.
    """
    try:
        return epath.Path(path if is_remote(path) else os.path.abspath(path))
    except KeyError as error:
        raise UserError(f"{path}: no checkpoint can be at such an address: give a directory or gs://") from error
