"""Self-describing checkpoints.

    D/                   what `convert import` writes: a whole model in the types of its source
      llava.json           the description below
      tokenizer/           the tokenizer's files
      params/              Orbax
    W/                   a training workdir
      llava.json tokenizer/
      checkpoints/STEP/    Orbax: `params` (the trained ones, float32), `optimizer`, and the description
      frozen/ID/           what `convert copy-frozen` writes: the parameters that come from the checkpoint of that `id`

A checkpoint of training holds what was trained; the description says which directory each frozen parameter
comes from, so that it is stored once and leaves bit-equal. Nothing is decided by the name of a path.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from llava_jax import quiet
from llava_jax.array_store import TREE, ArrayWriter, layer_by_layer, open_array, parts_of
from llava_jax.cli import UserError, short
from llava_jax.convert import hf_fields
from llava_jax.data.tokenizer_files import MAX_BYTES
from llava_jax.incoming import loads, read_bytes, read_object, refuse_pointers_below, to_utf8
from llava_jax.lock import entries, hold
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import Params, abstract_params, check_names
from llava_jax.remote import is_remote, may_read
from llava_jax.whole_file import whole_file

quiet.mute_failures_of_orbax()

DESCRIPTION = "llava.json"
FROZEN = "frozen"  # in a workdir: copies of what its checkpoints take from elsewhere, by their `id`
FORMAT = 1
STEPS = "checkpoints"  # in a workdir
DIGEST = "digest"  # of the description, in a step
MAX_COMPRESSION = 100  # of weights; those of any training hardly shrink
_ID = re.compile(r"[\w-]{1,64}", re.ASCII)


@dataclasses.dataclass(frozen=True)
class Source:
    """Where parameters that a checkpoint does not hold are found."""

    path: str  # as it was when the run started
    relative: str  # the same, from the directory of the checkpoint: survives moving both
    id: str  # of that directory, so that one rewritten since is noticed
    names: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Description:
    """All that is needed to use the weights."""

    model: LlavaConfig
    template: str  # of conversations, see `data.conversation.TEMPLATES`
    hf: dict[str, Any] = dataclasses.field(default_factory=dict)  # the source's JSON files, kept for export
    sources: tuple[Source, ...] = ()
    stage: str | None = None  # of the training that made it; None for one that has not been trained as a whole
    origins: dict[str, str] = dataclasses.field(default_factory=dict)  # flag of the import -> name on the Hub @ commit
    id: str = dataclasses.field(default_factory=lambda: uuid.uuid4().hex)

    def to_json(self) -> dict[str, Any]:
        # Through text, so that what is compared and what is read back have the same plain types.
        return json.loads(json.dumps({"format": FORMAT} | dataclasses.asdict(self)))

    @classmethod
    def from_json(cls, values: dict[str, Any], where: str) -> "Description":
        values = dict(values)
        if values.pop("format", None) != FORMAT:
            raise UserError(f"{where}: not a llava_jax checkpoint of format {FORMAT}; import or train it again")
        values["model"] = LlavaConfig.from_dict(values["model"])
        values["sources"] = tuple(Source(**s | {"names": tuple(s["names"])}) for s in values["sources"])
        description = cls(**values)
        description._check(where)
        return description

    def _check(self, where: str) -> None:
        """Raises an error for fields of other types, which would show only where they are used."""
        fields = dataclasses.asdict(self)
        hf, origins = hf_fields.part(fields, "hf", where), hf_fields.part(fields, "origins", where)
        config, generation = (
            hf_fields.part(hf, "config", f"{where}: hf"),
            hf_fields.part(hf, "generation_config", f"{where}: hf"),
        )
        hf_fields.check_generation(generation, f"{where}: hf.generation_config")
        hf_fields.get(config, "image_token_index", 0, f"{where}: hf.config")
        for name in ("text_config", "vision_config"):
            hf_fields.get(
                hf_fields.part(config, name, f"{where}: hf.config"), "model_type", "", f"{where}: hf.config.{name}"
            )
        texts = [self.template, self.stage or "", *origins.values()]
        texts += [text for source in self.sources for text in (source.path, source.relative, *source.names)]
        if not all(isinstance(text, str) and "\0" not in text for text in texts):
            raise ValueError("template, stage, origins and sources are not all texts")
        if not all(_ID.fullmatch(id) for id in (self.id, *(source.id for source in self.sources))):  # a folder's name
            raise ValueError("id is none")


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk, its weights not yet read. See `open_checkpoint`."""

    root: epath.Path  # the import's directory or the workdir
    weights: epath.Path  # the Orbax directory
    name: str | None  # of the weights inside it (`params`), None where it is the whole
    description: Description
    tokenizer_dir: epath.Path
    step: int | None = None

    @property
    def config(self) -> LlavaConfig:
        return self.description.model

    @property
    def template(self) -> str:
        return self.description.template

    def with_image_position(self, position: str) -> "Checkpoint":
        """The same, asked with images at these places instead of where they stood in training."""
        model = dataclasses.replace(self.config, image_position=position)
        return dataclasses.replace(self, description=dataclasses.replace(self.description, model=model))

    @functools.cached_property
    def stored(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of the parameters held here, without those of the sources."""
        with readable(self.weights):
            if self.name is None:
                metadata = ocp.metadata(self.weights).metadata
            else:
                metadata = ocp.checkpointables_metadata(self.weights).metadata[self.name]
            return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in metadata.items()}

    @functools.cached_property
    def parts(self) -> list[tuple["Checkpoint", tuple[str, ...]]]:
        """The checkpoints that together hold the whole model, each with the names to take from it."""
        own = tuple(self.stored)
        return [(self, own)] + [(self._open(source), source.names) for source in self.description.sources]

    def _open(self, source: Source) -> "Checkpoint":
        if has_copy(self.root, source):
            return open_checkpoint(frozen_copy(self.root, source))
        for path in (self.root / source.relative, epath.Path(source.path)):
            if not may_read(path, self.root):
                raise UserError(self._unnamed(source))
            if path.exists():
                found = open_checkpoint(path)
                if found.description.id == source.id:
                    return found
        raise UserError(
            f"{self.root}: its frozen parameters come from {source.path}, which is gone or was written anew since; "
            "put the original back (convert copy-frozen would have brought them into the workdir)"
        )

    def _unnamed(self, source: Source) -> str:
        command = f"copy --output DIR --checkpoint {self.root}"
        if self.step is not None:
            command = f"copy-frozen --checkpoint {self.root}"
        return (
            f"{self.root}: its frozen parameters are at {short(source.path)}, which this checkpoint names and you did "
            f"not, so nothing is read there. If you know that place, copy them: python -m llava_jax.convert {command} "
            f"--source {source.path}"
        )

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and stored types of the whole model."""
        return {name: part.stored[name] for part, names in self.parts for name in names}

    def check(self) -> None:
        """Raises UserError unless names and shapes are those of the model, and its files of the size for them."""
        for part, _ in self.parts:
            _refuse_inflated(part.weights, part.stored)
        try:
            check_names(self.abstract(), abstract_params(self.config))
        except ValueError as error:
            raise UserError(f"{self.weights}: does not hold this model: {error}") from None

    def read(self, name: str, layer: int | None = None) -> np.ndarray:
        """One parameter as it is stored, or one layer of a stacked one, of which nothing else is kept in memory."""
        part = self._part_with(name)
        with readable(part.weights):
            return part._array(name, layer).read().result()

    def read_parts(self, name: str, layer: int | None = None) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """The same in parts, each with its place."""
        part = self._part_with(name)
        with readable(part.weights):
            yield from parts_of(part._array(name, layer))

    def _part_with(self, name: str) -> "Checkpoint":
        return next(part for part, names in self.parts if name in names)

    def _array(self, name: str, layer: int | None) -> ts.TensorStore:
        array = open_array(self.weights / (self.name or TREE), name)
        return array if layer is None else array[layer]

    def load(
        self,
        names: Iterable[str] | None = None,
        dtype: Callable[[str, jnp.dtype], jnp.dtype] = lambda name, stored: stored,
        sharding: Callable[[str], jax.sharding.Sharding] | None = None,
    ) -> Params:
        """Reads the named parameters (all by default), each in `dtype(name, stored type)`.

        Each is sharded as it is read, or lies on the first device.
        """
        if sharding is None:
            single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
            sharding = functools.partial(_always, single)
        self.check()
        shapes = abstract_params(self.config)
        wanted = set(shapes if names is None else names)
        params: Params = {}
        for part, held in self.parts:
            here = wanted.intersection(held)
            if here:
                tree = {
                    name: jax.ShapeDtypeStruct(leaf.shape, dtype(name, leaf.dtype), sharding=sharding(name))
                    if name in here
                    else ...
                    for name, leaf in part.stored.items()
                }
                params |= {name: value for name, value in part._read(tree).items() if name in here}
        return {name: params[name] for name in shapes if name in wanted}

    def _read(self, tree: dict[str, Any]) -> Params:
        with readable(self.weights):
            if self.name is None:
                return ocp.load(self.weights, tree)
            return ocp.load_checkpointables(self.weights, {self.name: tree})[self.name]

    def sources_of(self, names: Iterable[str], directory: epath.Path) -> tuple[Source, ...]:
        """How a checkpoint in `directory` refers to these parameters: at the place that really holds each."""
        wanted = set(names)
        sources = []
        for part, held in self.parts:
            here = tuple(sorted(wanted.intersection(held)))
            if not here:
                continue
            path = part.root if part.step is None else part.weights
            place = os.fspath(absolute(path))
            # Between a bucket and a disk, or two buckets, there is no relative path.
            related = not (is_remote(path) or is_remote(directory))
            relative = os.path.relpath(place, os.path.abspath(directory)) if related else place
            sources.append(Source(place, relative, part.description.id, here))
        return tuple(sources)


def _refuse_inflated(directory: epath.Path, stored: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises UserError where a local directory is far smaller than the arrays that it says it holds: what is missing in
    an array is read as zeros, however large."""
    if is_remote(directory):
        return
    claimed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in stored.values())
    held = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
    if claimed > MAX_COMPRESSION * held + 2**26:
        raise UserError(f"{directory}: claims {claimed / 1e9:.1f} GB of parameters, but holds {held / 1e9:.1g} GB")


@contextlib.contextmanager
def _in_one_line(path: epath.Path, problem: str) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise, of any class and over many lines, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{path}: {problem} ({_cause(error)})") from error


@contextlib.contextmanager
def readable(path: epath.Path) -> Iterator[None]:
    """The same where a checkpoint is read, or a step of a workdir: the error names the array, and what else to use."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        refuse_pointers_below(path)
        raise damaged(path, _cause(error)) from error


def damaged(path: epath.Path, why: str) -> UserError:
    """What to say of a checkpoint, or of a step of a workdir, that cannot be read."""
    if path.parent.name != STEPS:
        return UserError(f"{path}: is damaged ({why}): import or copy it again")
    earlier = [step for step in finished_steps(path.parent) if step < int(path.name)]
    if not earlier:
        return UserError(f"{path}: this step is damaged ({why}), and none is there before it: train in another workdir")
    return UserError(
        f"{path}: this step is damaged ({why}): resume training from the one before with --resume-from {earlier[-1]}, "
        f"or give other commands {path.parent / str(earlier[-1])}"
    )


def _cause(error: BaseException) -> str:
    """What is at the bottom of an error of Orbax, with the name of the array that TensorStore could not read."""
    while inner := error.__cause__ or error.__context__:
        error = inner
    said = next(iter(str(error).splitlines()), "").partition(" [tensorstore_spec")[0]
    if array := re.search(r'([^"/]+)/(?:c(?:/\d+)*|zarr\.json)"', said):
        said = re.sub(r' (?:in OCDBT database )?at local file "[^"]*"', "", said)
        return f"{array[1]}: {said.rpartition(': ')[2][:200]}"
    return f"{type(error).__name__}: {said[:300]}"


def absolute(path: str | os.PathLike) -> epath.Path:
    """The path, local or remote (`gs://`), from the root: Orbax takes no other."""
    return epath.Path(path if is_remote(path) else os.path.abspath(path))


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens the output of `convert import`, a training workdir (its newest step) or one step's directory.

    Raises UserError if it is none of these.
    """
    path = absolute(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint{_other_steps(path)}")
    if (path / "params").exists() and (path / DESCRIPTION).exists():
        return Checkpoint(path, path / "params", None, read_description(path), path / "tokenizer")
    if (path / STEPS).exists():
        steps = finished_steps(path / STEPS)
        if not steps:
            raise UserError(f"{path}: a workdir without a finished checkpoint")
        return _open_step(path / STEPS / str(steps[-1]))
    if path.name.isdecimal() and ocp.is_orbax_checkpoint(path):
        return _open_step(path)
    raise UserError(
        f"{path}: neither the output of `convert import` (no {DESCRIPTION} and params/) nor a training workdir "
        "(no checkpoints/) nor one step of it"
    )


def open_step(workdir: epath.Path, step: int) -> Checkpoint:
    """The same of a step that is asked for. Raises UserError that lists the steps if it is not there."""
    path = absolute(workdir) / STEPS / str(step)
    if not path.exists():
        raise UserError(f"{workdir}: has no step {step}{_other_steps(path)}")
    return _open_step(path)


def _other_steps(path: epath.Path) -> str:
    steps = finished_steps(path.parent) if path.parent.name == STEPS and path.parent.exists() else []
    return f": the steps there are {', '.join(map(str, steps))}" if steps else ""


def _open_step(path: epath.Path) -> Checkpoint:
    with readable(path):
        metadata = dict(ocp.checkpointables_metadata(path).custom_metadata or {})
    digest = metadata.pop(DIGEST, None)  # which steps of earlier versions do not have
    if "format" not in metadata or digest not in (None, _digest(metadata)):
        raise damaged(path, "its _CHECKPOINT_METADATA is cut off, altered or missing")
    root = path.parent.parent
    with readable(path):
        description = Description.from_json(metadata | _earlier(metadata, root), where=str(path))
    return Checkpoint(root, path, "params", description, root / "tokenizer", step=int(path.name))


def _digest(metadata: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(metadata, sort_keys=True).encode()).hexdigest()[:16]


def _earlier(metadata: dict[str, Any], workdir: epath.Path) -> dict[str, Any]:
    """What steps of earlier versions do not say, `image_position` of the model, as the configuration of their run."""
    model, file = metadata.get("model"), workdir / "config.json"
    if model is None or "image_position" in model or not file.exists():
        return {}
    try:
        position = read_object(file, strict=False)["image_position"]
    except (OSError, UserError, KeyError) as error:
        raise UserError(f"{file}: damaged, and no other file says where images stood: {error!r}") from None
    return {"model": model | {"image_position": position}}


def read_description(directory: epath.Path) -> Description:
    file = directory / DESCRIPTION
    text = to_utf8(read_bytes(file), file)
    try:
        return Description.from_json(loads(text, strict=False), where=str(file))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file}: damaged description ({error!r}); import it again") from None


def frozen_copy(workdir: epath.Path, source: Source) -> epath.Path:
    """The place in a workdir for a copy of what it takes from a source."""
    return workdir / FROZEN / source.id


def has_copy(workdir: epath.Path, source: Source) -> bool:
    return (frozen_copy(workdir, source) / DESCRIPTION).exists()  # which is written last


def needed(workdir: epath.Path, description: Description) -> list[str]:
    """The checkpoints elsewhere that those of a workdir take parameters from."""
    return [source.path for source in description.sources if not has_copy(workdir, source)]


def _always(value: Any, _name: str) -> Any:
    return value


def write_description(directory: epath.Path, description: Description) -> None:
    with whole_file(directory / DESCRIPTION) as file:
        file.write(json.dumps(description.to_json(), indent=2).encode() + b"\n")


def finished_steps(directory: epath.Path) -> list[int]:
    """The steps with a complete checkpoint, oldest first."""
    steps = (int(entry.name) for entry in directory.iterdir() if entry.name.isdecimal())
    return sorted(step for step in steps if ocp.is_orbax_checkpoint(directory / str(step)))


def copy_tokenizer(source: epath.Path, target: epath.Path) -> None:
    target.mkdir(parents=True, exist_ok=True)
    for file in source.iterdir():
        if not file.is_dir():
            (target / file.name).write_bytes(read_bytes(file, MAX_BYTES))  # from a disk to a bucket as well


Piece = tuple[str, int | None, np.ndarray]  # a parameter, a layer of it or None for the whole, values


def save_model(directory: str | os.PathLike, params: Params, description: Description, tokenizer_dir: str) -> None:
    """Writes a whole model; nothing is left behind if it fails. Raises UserError if `directory` exists."""
    shapes = {name: jax.ShapeDtypeStruct(value.shape, value.dtype) for name, value in params.items()}
    pieces = ((name, None, np.asarray(value)) for name, value in params.items())
    write_model(directory, shapes, pieces, description, tokenizer_dir)


def write_model(
    directory: str | os.PathLike,
    shapes: dict[str, jax.ShapeDtypeStruct],
    pieces: Iterable[Piece],
    description: Description,
    tokenizer_dir: str,
) -> None:
    """The same from pieces that make up parameters of these shapes and types, each written when it comes."""
    directory = absolute(directory)
    try:
        check_names(shapes, abstract_params(description.model))
    except ValueError as error:
        raise UserError(f"{directory}: these parameters are not the model's: {error}") from None
    with new_directory(directory) as partial:
        copy_tokenizer(epath.Path(tokenizer_dir), partial / "tokenizer")
        _write_weights(partial, directory, shapes, pieces, description)


def write_part(
    directory: epath.Path, shapes: dict[str, jax.ShapeDtypeStruct], pieces: Iterable[Piece], description: Description
) -> None:
    """Some parameters of the model that `description` is of, for checkpoints that name it as a source."""
    with new_directory(directory) as partial:
        _write_weights(partial, directory, shapes, pieces, description)


def _write_weights(
    partial: epath.Path,
    directory: epath.Path,
    shapes: dict[str, jax.ShapeDtypeStruct],
    pieces: Iterable[Piece],
    description: Description,
) -> None:
    """Into `partial`, which becomes `directory` and is called that in errors."""
    if not is_remote(partial):
        check_free(partial, sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in shapes.values()))
    with _in_one_line(directory, "cannot be written"), ArrayWriter(partial / "params", shapes) as writer:
        for name, layer, values in pieces:
            writer.write(name, layer, values)
    write_description(partial, description)


def check_free(directory: os.PathLike, size: int) -> None:
    """Raises UserError where a local disk has no room for so many bytes, before time is spent on filling it."""
    free = shutil.disk_usage(directory).free
    if size > free:
        raise UserError(
            f"{os.path.dirname(directory)}: the weights take {size / 1e9:.1f} GB, but {free / 1e9:.1f} GB are free"
        )


def refuse_existing(directory: str | os.PathLike) -> None:
    """Raises UserError unless `directory` is empty or not there."""
    directory = epath.Path(directory)
    if directory.exists() and (not directory.is_dir() or entries(directory)):
        raise UserError(f"{directory}: exists already; remove it or choose another output")


@contextlib.contextmanager
def new_directory(directory: epath.Path) -> Iterator[epath.Path]:
    """A directory beside `directory` to fill, which takes its name at the end and vanishes on an error.

    Object stores have no directories to rename: a remote one is filled in its place, by one process at a time. So write
    last what makes it valid.
    """
    if is_remote(directory):
        with hold(directory):
            refuse_existing(directory)
            with _gone_on_error(directory):
                yield directory
        return
    refuse_existing(directory)
    partial = directory.parent / f".{directory.name}.partial-{uuid.uuid4().hex[:8]}"
    partial.mkdir(parents=True)
    with _gone_on_error(partial):
        yield partial
        refuse_existing(directory)  # another process may have made it in the meantime
        if directory.exists():
            directory.rmdir()
        partial.rename(directory)


@contextlib.contextmanager
def _gone_on_error(directory: epath.Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _remove(directory)
        raise


def _remove(directory: epath.Path) -> None:
    """Removes a directory, and for a second what threads of Orbax still write there after a failure."""
    unfinished = any(directory.glob("*.orbax-checkpoint-tmp"))
    for _ in range(10 if unfinished else 1):
        with contextlib.suppress(OSError):
            directory.rmtree()
        time.sleep(0.1 * unfinished)


class TrainingCheckpoints:
    """The steps of a run: saved asynchronously, the newest `keep` of them kept."""

    def __init__(self, workdir: epath.Path, description: Description, keep: int):
        self.description = description
        self.directory = absolute(workdir) / STEPS
        self.directory.mkdir(parents=True, exist_ok=True)
        self.checkpointer = ocp.training.Checkpointer(
            self.directory,
            save_decision_policy=ocp.training.save_decision_policies.FixedIntervalPolicy(1),
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
            lightweight_initialize=True,  # whether the metadata of all steps can be read, or not
            context=layer_by_layer(),
        )
        self.latest = max(finished_steps(self.directory), default=None)

    def save(self, step: int, trainable: Params, optimizer: Any, *, wait: bool = False) -> None:
        """Blocks until the arrays are copied to the host; with `wait`, until all is on disk."""
        with _in_one_line(self.directory, "cannot be written"):
            if self.latest == step:
                self.checkpointer.wait()
                return
            state = {"params": trainable, "optimizer": optimizer}
            metadata = self.description.to_json()
            metadata[DIGEST] = _digest(metadata)
            self.checkpointer.save_checkpointables_async(step, state, custom_metadata=metadata, force=True)
            self.latest = step
            if wait:
                self.checkpointer.wait()

    def restore(self, step: int, trainable: Any, optimizer: Any) -> tuple[Params, Any]:
        """Loads a step into trees of ShapeDtypeStructs (with shardings) or arrays of the same structure."""
        self.checkpointer.wait()
        abstract = jax.tree.map(
            lambda leaf: jax.ShapeDtypeStruct(np.shape(leaf), leaf.dtype, sharding=getattr(leaf, "sharding", None)),
            {"params": trainable, "optimizer": optimizer},
        )
        with readable(self.directory / str(step)):
            loaded = ocp.load_checkpointables(self.directory / str(step), abstract)
        return loaded["params"], loaded["optimizer"]

    def reload(self) -> None:
        """Looks again which steps there are."""
        self.checkpointer.reload()
        self.latest = max(finished_steps(self.directory), default=None)

    def close(self) -> None:
        with _in_one_line(self.directory, "cannot be written"):
            self.checkpointer.close()
