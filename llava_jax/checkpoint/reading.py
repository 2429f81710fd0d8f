"""Opens checkpoints, and reads their parameters as sharded arrays, layer by layer or chunk by chunk."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from llava_jax.checkpoint.array_store import TREE, open_array, read_chunks
from llava_jax.checkpoint.errors import damaged, readable
from llava_jax.checkpoint.format import (
    DESCRIPTION,
    DIGEST,
    STEPS,
    Description,
    Source,
    absolute,
    digest,
    finished_steps,
    frozen_copy,
    has_copy,
    read_description,
)
from llava_jax.cli import UserError, short
from llava_jax.files.reading import read_object
from llava_jax.models import pieces
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import Params, abstract_params, check_names
from llava_jax.remote import is_remote, may_read

MAX_COMPRESSION = 100  # of arrays on disk; trained weights hardly shrink


class Held(NamedTuple):
    """Rows of a parameter in one of the checkpoints that hold it: all, or some layers of a stack (`models.pieces`)."""

    start: int
    stop: int
    holder: "Checkpoint"
    stored: str  # the name there
    offset: int  # the row `start` of the parameter is this row of the stored array

    @property
    def leaf(self) -> jax.ShapeDtypeStruct:
        """Their shape and stored type."""
        stored = self.holder.stored[self.stored]
        return jax.ShapeDtypeStruct((self.stop - self.start, *stored.shape[1:]), stored.dtype)

    def within(self, start: int, stop: int) -> "Held":
        """Those of them that are rows `start` to `stop`, maybe none, of the parameter."""
        first, last = max(start, self.start), min(stop, self.stop)
        return self._replace(start=first, stop=max(first, last), offset=self.offset + first - self.start)

    def open(self) -> ts.TensorStore:
        array = open_array(self.holder.weights / (self.holder.name or TREE), self.stored)
        return array[self.offset : self.offset + self.stop - self.start][ts.d[0].translate_to[0]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint, whose weights have not been read yet. See `open_checkpoint`."""

    root: epath.Path  # the directory of an import, or the workdir
    weights: epath.Path  # the Orbax directory
    name: str | None  # of the weights inside it (`params`), None if it holds nothing else
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
        """The same, for prompts with images at this position of a turn instead of that of training."""
        model = dataclasses.replace(self.config, image_position=position)
        return dataclasses.replace(self, description=dataclasses.replace(self.description, model=model))

    @functools.cached_property
    def stored(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and types of the parameters in this checkpoint, without those of its sources."""
        with readable(self.weights):
            if self.name is None:
                metadata = ocp.metadata(self.weights).metadata
            else:
                metadata = ocp.checkpointables_metadata(self.weights).metadata[self.name]
            return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in metadata.items()}

    @functools.cached_property
    def holders(self) -> list[tuple["Checkpoint", tuple[str, ...]]]:
        """This checkpoint and its sources, each with the names of the parameters to take from it."""
        own = tuple(self.stored)
        return [(self, own)] + [(self._open(source), source.names) for source in self.description.sources]

    def _open(self, source: Source) -> "Checkpoint":
        if has_copy(self.root, source):
            return open_checkpoint(frozen_copy(self.root, source))
        if not (may_read(source.relative, self.root) and may_read(source.path, self.root)):
            raise UserError(self._unnamed(source))
        for path in (self.root / source.relative, epath.Path(source.path)):
            if path.exists():
                found = open_checkpoint(path)
                if found.description.id == source.id:
                    return found
        raise UserError(
            f"{self.root}: its frozen parameters come from {source.path}, which no longer exists or has been "
            "overwritten; put the original back (convert copy-frozen would have copied them into the workdir)"
        )

    def _unnamed(self, source: Source) -> str:
        command = f"copy --output DIR --checkpoint {self.root}"
        if self.step is not None:
            command = f"copy-frozen --checkpoint {self.root}"
        return (
            f"{self.root}: its frozen parameters are at {short(source.path)}, which this checkpoint names but you did "
            f"not, so it is not read. If you trust that address, copy them: python -m llava_jax.convert {command} "
            f"--source {source.path}"
        )

    @functools.cached_property
    def held(self) -> dict[str, list[Held]]:
        """Where the rows of each parameter are, in order."""
        found: dict[str, list[Held]] = {}
        for holder, names in self.holders:
            for name in names:
                found.setdefault(pieces.whole(name), []).append(holder.own(name))
        for name, parts in found.items():
            parts.sort(key=lambda part: part.start)
            if [part.start for part in parts] != [0, *(part.stop for part in parts[:-1])]:
                raise damaged(self.weights, f"it has not every layer of {name} once")
        return found

    def own(self, name: str) -> Held:
        """A parameter or a piece, in the array of this checkpoint, without its sources, that has it."""
        for stored, leaf in {name: self.stored[name]}.items() if name in self.stored else self.stored.items():
            if pieces.whole(stored) == pieces.whole(name):
                first, last = pieces.rows(stored, leaf)
                start, stop = pieces.rows(name, leaf)
                if first <= start < stop <= last:
                    return Held(start, stop, self, stored, start - first)
        raise damaged(self.weights, f"it lacks {name}")

    @functools.cached_property
    def _abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        shapes = {}
        for name, parts in self.held.items():
            dtype = jnp.result_type(*(part.leaf.dtype for part in parts))
            shapes[name] = jax.ShapeDtypeStruct((parts[-1].stop, *parts[0].leaf.shape[1:]), dtype)
        return shapes

    def abstract(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Names, shapes and stored types of all parameters, those of the sources included.

        The type of a stack whose layers are in several checkpoints is one that holds the types of all.
        """
        return dict(self._abstract)

    def check(self) -> None:
        """Raises UserError unless names and shapes are those of the model, and the files are large enough for them."""
        for holder, _ in self.holders:
            _refuse_inflated(holder.weights, holder.stored)
        try:
            check_names(self.abstract(), abstract_params(self.config))
        except ValueError as error:
            raise UserError(f"{self.weights}: does not hold this model: {error}") from None

    def rows(self, name: str, layer: int | None = None) -> list[Held]:
        """Where a parameter, a piece, or one layer of either is stored."""
        start, stop = pieces.rows(name, self._abstract[pieces.whole(name)])
        if layer is not None:
            start, stop = start + layer, start + layer + 1
        parts = (part.within(start, stop) for part in self.held[pieces.whole(name)])
        return [part for part in parts if part.start < part.stop]

    def read(self, name: str, layer: int | None = None, index: tuple[slice, ...] = ()) -> np.ndarray:
        """A parameter or a piece in its stored type, or one layer of it; only `index` of the axes after the first."""
        values = []
        for part in self.rows(name, layer):
            with readable(part.holder.weights):
                values.append(part.open()[(slice(None), *index)].read().result())
        value = values[0] if len(values) == 1 else np.concatenate(values)
        value = value.astype(self._abstract[pieces.whole(name)].dtype, copy=False)
        return value if layer is None else value[0]

    def read_chunks(self, name: str, layer: int | None = None) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """The same in chunks, as (index, values)."""
        parts, dtype = self.rows(name, layer), self._abstract[pieces.whole(name)].dtype
        for part in parts:
            with readable(part.holder.weights):
                for (rows, *rest), values in read_chunks(part.open()):
                    values = values.astype(dtype, copy=False)
                    if layer is not None:
                        yield tuple(rest), values[0]
                        continue
                    first, last, _ = rows.indices(part.stop - part.start)
                    offset = part.start - parts[0].start
                    yield (slice(first + offset, last + offset), *rest), values

    def load(
        self,
        names: Iterable[str] | None = None,
        dtype: Callable[[str, jnp.dtype], jnp.dtype] = lambda name, stored: stored,
        sharding: Callable[[str], jax.sharding.Sharding] | None = None,
    ) -> Params:
        """Reads the named parameters or pieces (all by default), each in `dtype(name, stored type)`.

        Each is sharded by `sharding(name)` while it is read, or put on the first device.
        """
        single = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        self.check()
        wanted: dict[str, jax.ShapeDtypeStruct] = {}
        for name in abstract_params(self.config) if names is None else names:
            leaf, target = self._abstract[pieces.whole(name)], sharding(name) if sharding else single
            start, stop = pieces.rows(name, leaf)
            shape = (stop - start, *leaf.shape[1:])
            wanted[name] = jax.ShapeDtypeStruct(shape, dtype(name, leaf.dtype), sharding=target)
        params: Params = {}
        for holder, _ in self.holders:
            tree: dict[str, Any] = dict.fromkeys(holder.stored, ...)  # Orbax leaves these out
            here = {name for name in wanted.keys() & tree if self.rows(name) == [holder.own(name)]}
            if here:
                loaded = holder._read(tree | {name: wanted[name] for name in here})
                params |= {name: loaded[name] for name in here}
        return {name: params[name] if name in params else self._read_rows(name, leaf) for name, leaf in wanted.items()}

    def _read(self, tree: dict[str, Any]) -> Params:
        with readable(self.weights):
            if self.name is None:
                return ocp.load(self.weights, tree)
            return ocp.load_checkpointables(self.weights, {self.name: tree})[self.name]

    def _read_rows(self, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        """A parameter that no checkpoint stores as it is: some layers of a stack, or layers of several checkpoints."""

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return self.read(name, index=index[1:])[index[0]].astype(like.dtype)

        return jax.make_array_from_callback(like.shape, like.sharding, shard)

    def sources_of(self, names: Iterable[str], directory: epath.Path) -> tuple[Source, ...]:
        """The sources with which a checkpoint in `directory` refers to these parameters: those that hold them."""
        held = [(part, self._name_of(name, part)) for name in names for part in self.rows(name)]
        sources = []
        for holder, _ in self.holders:
            here = tuple(sorted(name for part, name in held if part.holder is holder))
            if not here:
                continue
            path = holder.root if holder.step is None else holder.weights
            address = os.fspath(absolute(path))
            # Between a bucket and a disk, or two buckets, there is no relative path.
            local = not (is_remote(path) or is_remote(directory))
            relative = os.path.relpath(address, os.path.abspath(directory)) if local else address
            sources.append(Source(address, relative, holder.description.id, here))
        return tuple(sources)

    def _name_of(self, name: str, part: Held) -> str:
        """The name of the rows `part` of a parameter."""
        whole = pieces.whole(name)
        everything = (part.start, part.stop) == (0, *self._abstract[whole].shape[:1])
        return whole if everything else pieces.piece(whole, part.start, part.stop)


def _refuse_inflated(directory: epath.Path, stored: dict[str, jax.ShapeDtypeStruct]) -> None:
    """Raises UserError if a local directory is far smaller than the arrays that its metadata claims, since arrays of
    any size could be claimed."""
    if is_remote(directory):
        return
    claimed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in stored.values())
    held = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
    if claimed > MAX_COMPRESSION * held + 2**26:
        raise UserError(f"{directory}: claims {claimed / 1e9:.1f} GB of parameters, but holds {held / 1e9:.1g} GB")


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
    """The same for a certain step. Raises UserError that lists the steps if it does not exist."""
    path = absolute(workdir) / STEPS / str(step)
    if not path.exists():
        raise UserError(f"{workdir}: has no step {step}{_other_steps(path)}")
    return _open_step(path)


def _other_steps(path: epath.Path) -> str:
    steps = finished_steps(path.parent) if path.parent.name == STEPS else []
    return f": the steps there are {', '.join(map(str, steps))}" if steps else ""


def _open_step(path: epath.Path) -> Checkpoint:
    with readable(path):
        metadata = dict(ocp.checkpointables_metadata(path).custom_metadata or {})
    stored = metadata.pop(DIGEST, None)  # steps of earlier versions have none
    if "format" not in metadata or stored not in (None, digest(metadata)):
        raise damaged(path, "its _CHECKPOINT_METADATA is cut off, altered or missing")
    root = path.parent.parent
    with readable(path):
        description = Description.from_json(metadata | _earlier(metadata, root), where=str(path))
    return Checkpoint(root, path, "params", description, root / "tokenizer", step=int(path.name))


def _earlier(metadata: dict[str, Any], workdir: epath.Path) -> dict[str, Any]:
    """`image_position` of the model, which steps of earlier versions lack, from the configuration of their run."""
    model, file = metadata.get("model"), workdir / "config.json"
    if model is None or "image_position" in model or not file.exists():
        return {}
    try:
        position = read_object(file, strict=False)["image_position"]
    except (OSError, UserError, KeyError) as error:
        raise UserError(f"{file}: damaged, and no other file has image_position: {error!r}") from None
    return {"model": model | {"image_position": position}}
