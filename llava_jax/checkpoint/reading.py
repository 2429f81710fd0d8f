"""Opens checkpoints, and reads their parameters as sharded arrays, layer by layer or chunk by chunk."""

import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from etils import epath
from orbax.checkpoint import v1 as ocp

from llava_jax import remote
from llava_jax.checkpoint import format
from llava_jax.checkpoint.array_store import TREE, open_array, read_chunks
from llava_jax.checkpoint.errors import damaged, readable
from llava_jax.cli import UserError, short, track
from llava_jax.files.reading import read_object
from llava_jax.models import pieces
from llava_jax.models.config import LlavaConfig, quantized
from llava_jax.models.llava import Params, Shapes, abstract_params, check_names
from llava_jax.models.quantized import PART, PARTS, dequantize_stack, linear_of, quantize, unsharded
from llava_jax.remote import is_remote, may_read

PART_BYTES = 2**30  # of parameters that are loaded at once, so that progress can be shown
MAX_COMPRESSION = 100  # of arrays on disk; trained weights hardly shrink
# How parameters are loaded: by its name, the type of each, which may depend on the stored one, and its sharding.
DtypeOf = Callable[[str, jnp.dtype], jnp.dtype]
ShardingOf = Callable[[str], jax.sharding.Sharding]


def as_stored(name: str, stored: jnp.dtype) -> jnp.dtype:
    return stored


def first_device(name: str) -> jax.sharding.Sharding:
    return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


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
        array = open_array(self.holder.weights / self.holder.name, self.stored)
        return array[self.offset : self.offset + self.stop - self.start][ts.d[0].translate_to[0]]


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """An open checkpoint, whose weights have not been read yet. See `open_checkpoint`."""

    root: epath.Path  # the directory of an import, or the workdir
    weights: epath.Path  # the Orbax directory
    name: str  # of the weights inside it: `TREE`, which is all of an import, `ema` or `params`
    description: format.Description
    tokenizer_dir: epath.Path
    step: int | None = None
    rounded: str = ""  # see `dequantized`

    @property
    def config(self) -> LlavaConfig:
        return self.description.model

    @property
    def template(self) -> str:
        return self.description.template

    def quantized(self, base_dtype: str) -> "Checkpoint":
        """The same with quantized weights, see `models.quantized`: if it has plain ones, these are quantized when they
        are read. "" is the type that the checkpoint has.

        Raises UserError if the checkpoint's weights are quantized to another type.
        """
        stored, wanted = self.config.base_dtype, quantized(base_dtype)
        if base_dtype and stored not in ("", wanted):
            raise UserError(
                f"{self.root}: its language model is {stored}, and config.base_dtype is {base_dtype}: give "
                f"--config.base_dtype={stored}, or start from a checkpoint that is not quantized"
            )
        return self.with_model(base_dtype=wanted or stored)

    def dequantized(self) -> "Checkpoint":
        """The same as a plain model, whose weights are the dequantized ones."""
        return dataclasses.replace(self.with_model(base_dtype=""), rounded=self.config.base_dtype or self.rounded)

    def with_model(self, **fields: Any) -> "Checkpoint":
        """The same with other values of fields of `LlavaConfig`."""
        model = dataclasses.replace(self.config, **fields)
        return dataclasses.replace(self, description=dataclasses.replace(self.description, model=model))

    @functools.cached_property
    def stored(self) -> Shapes:
        """Names, shapes and types of the parameters in this checkpoint, without those of its sources."""
        with readable(self.weights):
            metadata = ocp.checkpointables_metadata(self.weights).metadata[self.name]
            return {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for name, leaf in metadata.items()}

    @functools.cached_property
    def holders(self) -> list[tuple["Checkpoint", tuple[str, ...]]]:
        """This checkpoint and its sources, each with the names of the parameters to take from it."""
        own = tuple(self.stored)
        return [(self, own)] + [(self._open(source), source.names) for source in self.description.sources]

    def _open(self, source: format.Source) -> "Checkpoint":
        if format.has_copy(self.root, source):
            return open_checkpoint(format.frozen_copy(self.root, source))
        if not (may_read(source.relative, self.root) and may_read(source.path, self.root)):
            command = f"copy --output DIR --checkpoint {self.root}"
            if self.step is not None:
                command = f"copy-frozen --checkpoint {self.root}"
            raise UserError(
                f"{self.root}: its frozen parameters are at {short(source.path)}, which this checkpoint names but you "
                f"did not, so it is not read. If you trust that address, copy them: python -m llava_jax.convert "
                f"{command} --source {source.path}"
            )
        for path in (self.root / source.relative, epath.Path(source.path)):
            if path.exists():
                found = open_checkpoint(path)
                if found.description.id == source.id:
                    return found
        raise UserError(
            f"{self.root}: its frozen parameters come from {source.path}, which no longer exists or has been "
            "overwritten; put the original back (convert copy-frozen would have copied them into the workdir)"
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
    def _held(self) -> Shapes:
        """Names, shapes and stored types of the whole parameters that are stored, those of the sources included.

        The type of a stack whose layers are in several checkpoints is one that holds the types of all.
        """
        shapes = {}
        for name, parts in self.held.items():
            dtype = jnp.result_type(*(part.leaf.dtype for part in parts))
            shapes[name] = jax.ShapeDtypeStruct((parts[-1].stop, *parts[0].leaf.shape[1:]), dtype)
        return shapes

    def abstract(self) -> Shapes:
        """Names, shapes and stored types of all parameters, those of the sources included."""
        held = dict(self._held)
        wanted = {name: leaf for name, leaf in abstract_params(self.config).items() if name not in held}
        new = {linear_of(name) for name in wanted} & {linear_of(name) for name in held} - {None}
        if not new:
            return held
        kernels = held["llm.embed_tokens.embedding"].dtype  # of what is only there quantized
        return {name: leaf for name, leaf in held.items() if linear_of(name) not in new} | {
            name: leaf.update(dtype=kernels) if name.endswith(".kernel") else leaf
            for name, leaf in wanted.items()
            if linear_of(name) in new
        }

    @functools.cached_property
    def _converted(self) -> dict[str, str]:
        """The linear layers that are quantized or dequantized when they are read, by the name of each parameter."""
        held, shapes = self._held, abstract_params(self.config)
        as_stored = dataclasses.replace(self.config, base_dtype=self.rounded)
        rounded = {linear_of(name) for name in abstract_params(as_stored) if PART.fullmatch(name)}
        return {
            name: linear for name in shapes if (linear := linear_of(name)) and (linear in rounded or name not in held)
        }

    def check(self) -> None:
        """Raises UserError unless names and shapes are those of the model, and the files are large enough for them."""
        for holder, _ in self.holders:
            refuse_inflated(holder.weights, holder.stored)
        try:
            check_names(self.abstract(), abstract_params(self.config))
        except ValueError as error:
            raise UserError(f"{self.weights}: does not hold this model: {error}") from None

    def rows(self, name: str, layer: int | None = None) -> list[Held]:
        """Where a parameter, a piece, or one layer of either is stored."""
        start, stop = pieces.rows(name, self._held[pieces.whole(name)])
        if layer is not None:
            start, stop = start + layer, start + layer + 1
        parts = (part.within(start, stop) for part in self.held[pieces.whole(name)])
        return [part for part in parts if part.start < part.stop]

    def read(self, name: str, layer: int | None = None, exact: bool = False) -> np.ndarray:
        """One parameter in its stored type, or one layer of a stacked one; `exact`: dequantized kernels as float32."""
        if name in self._converted:
            layers = range(self.config.text.num_layers) if layer is None else (layer,)
            found = [self._read_converted(name, layer, exact) for layer in layers]
            return np.stack(found) if layer is None else found[0]
        return self._read_held(name, layer)

    def _read_held(self, name: str, layer: int | None = None, index: tuple[slice, ...] = ()) -> np.ndarray:
        """Some layers of a stack, or one of them, or a parameter, as stored; `index` of the axes after the first."""
        values = []
        for part in self.rows(name, layer):
            with readable(part.holder.weights):
                values.append(part.open()[(slice(None), *index)].read().result())
        value = values[0] if len(values) == 1 else np.concatenate(values)
        value = value.astype(self._held[pieces.whole(name)].dtype, copy=False)
        return value if layer is None else value[0]

    def _read_converted(self, name: str, layer: int, exact: bool) -> np.ndarray:
        """A parameter of one layer of a linear layer that is quantized or dequantized."""
        linear, base_dtype = self._converted[name], self.rounded or self.config.base_dtype
        if f"{linear}.codes" in self._held:
            parts = {part: self._read_held(f"{linear}.{part}", layer) for part in PARTS[base_dtype]}
        else:
            parts = quantize(self._read_held(f"{linear}.kernel", layer), base_dtype)
        if part := PART.fullmatch(name):
            return np.asarray(parts[part["part"]])
        leaf = self.abstract()[name]
        one = leaf.update(shape=(1, *leaf.shape[1:]), dtype=jnp.float32 if exact else leaf.dtype)
        return np.asarray(dequantize_stack({part: value[None] for part, value in parts.items()}, one)[0])

    def read_chunks(self, name: str, layer: int | None = None) -> Iterator[tuple[tuple[slice, ...], np.ndarray]]:
        """The same in chunks, as (index, values)."""
        if self.is_computed(name):
            values = self.read(name, layer)
            yield (slice(None),) * values.ndim, values
            return
        parts, dtype = self.rows(name, layer), self._held[pieces.whole(name)].dtype
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

    def is_computed(self, name: str) -> bool:
        """Whether a parameter is not stored as it is read."""
        return name in self._converted

    def load(
        self, names: Iterable[str] | None = None, dtype: DtypeOf = as_stored, sharding: ShardingOf = first_device
    ) -> Params:
        """Reads the named parameters or pieces (all by default), each in `dtype(name, stored type)`.

        Each is sharded by `sharding(name)` while it is read.
        """
        self.check()
        wanted = dict.fromkeys(abstract_params(self.config) if names is None else names)
        stored, plain = self.abstract(), [name for name in wanted if name not in self._converted]
        params = self._load_held({n: (dtype(n, stored[pieces.whole(n)].dtype), sharding(n)) for n in plain})
        linears = sorted({self._converted[name] for name in wanted.keys() & self._converted})
        for linear in track(linears, "converting weights") if linears else ():
            params |= self._load_converted(linear, dtype, sharding)
        return {name: params[name] for name in wanted}

    def _load_held(self, targets: Mapping[str, tuple[jnp.dtype, jax.sharding.Sharding]]) -> Params:
        """Reads parameters or pieces that are stored under these names in a type and with a sharding."""
        wanted: Shapes = {}
        for name, (dtype, sharding) in targets.items():
            leaf = self._held[pieces.whole(name)]
            start, stop = pieces.rows(name, leaf)
            wanted[name] = jax.ShapeDtypeStruct((stop - start, *leaf.shape[1:]), dtype, sharding=sharding)
        parts: list[tuple[Checkpoint, Shapes]] = []
        for holder, _ in self.holders:
            here = [name for name in wanted if name in holder.stored and self.rows(name) == [holder.own(name)]]
            parts += [(holder, part) for part in _parts({name: wanted[name] for name in here})]
        params: Params = {}
        for holder, part in track(parts, f"loading {self.root}") if len(parts) > len(self.holders) else parts:
            with readable(holder.weights):
                tree: dict[str, Any] = dict.fromkeys(holder.stored, ...)  # Orbax leaves these out
                loaded = ocp.load(holder.weights, tree | part, checkpointable_name=holder.name)
            params |= {name: loaded[name] for name in part}
        return {name: params[name] if name in params else self._read_rows(name, leaf) for name, leaf in wanted.items()}

    def _load_converted(self, linear: str, dtype: DtypeOf, place: ShardingOf) -> Params:
        """The parameters of one stack of linear layers, quantized or dequantized."""
        parts, kernel = self._load_parts(linear, place), f"{linear}.kernel"
        if not self.rounded:
            return {f"{linear}.{part}": value for part, value in parts.items()}
        leaf = self.abstract()[kernel]
        return {kernel: dequantize_stack(parts, leaf.update(dtype=dtype(kernel, leaf.dtype), sharding=place(kernel)))}

    def _load_parts(self, linear: str, place: ShardingOf) -> dict[str, jax.Array]:
        """The quantized parts of one stack of linear layers; if it is to be dequantized, on every device."""
        base_dtype, kernel = self.rounded or self.config.base_dtype, f"{linear}.kernel"
        names = [f"{linear}.{part}" for part in PARTS[base_dtype]]
        everywhere = unsharded(place(kernel if self.rounded else names[0]))
        if names[0] in self._held:
            held = self._load_held({name: (self._held[name].dtype, everywhere) for name in names})
            return {part: held[f"{linear}.{part}"] for part in PARTS[base_dtype]}
        stored = self._held[kernel]
        like = {part: everywhere if self.rounded else place(f"{linear}.{part}") for part in PARTS[base_dtype]}
        target = place(kernel) if self.rounded else like["codes"]
        if not _divides(target, stored.shape):
            target = everywhere
        return quantize(self._load_held({kernel: (stored.dtype, target)})[kernel], base_dtype, like)

    def _read_rows(self, name: str, like: jax.ShapeDtypeStruct) -> jax.Array:
        """A parameter that no checkpoint stores as it is: some layers of a stack, or layers of several checkpoints."""

        def shard(index: tuple[slice, ...]) -> np.ndarray:
            return self._read_held(name, index=index[1:])[index[0]].astype(like.dtype)

        return jax.make_array_from_callback(like.shape, like.sharding, shard)

    def sources_of(self, names: Iterable[str], directory: epath.Path) -> tuple[format.Source, ...]:
        """The sources with which a checkpoint in `directory` refers to these parameters: those that hold them."""
        linears = {self._converted.get(name) for name in names} - {None}
        stored = [name for name in names if name not in self._converted]
        stored += [name for name in self._held if linear_of(name) in linears]
        held = [(part, self._name_of(name, part)) for name in stored for part in self.rows(name)]
        sources = []
        for holder, _ in self.holders:
            here = tuple(sorted(name for part, name in held if part.holder is holder))
            if not here:
                continue
            path = holder.root if holder.step is None else holder.weights
            address = os.fspath(format.absolute(path))
            # Between a bucket and a disk, or two buckets, there is no relative path.
            local = not (is_remote(path) or is_remote(directory))
            relative = os.path.relpath(address, os.path.abspath(directory)) if local else address
            sources.append(format.Source(address, relative, holder.description.id, here))
        return tuple(sources)

    def _name_of(self, name: str, part: Held) -> str:
        """The name of the rows `part` of a parameter."""
        whole = pieces.whole(name)
        everything = (part.start, part.stop) == (0, *self._held[whole].shape[:1])
        return whole if everything else pieces.piece(whole, part.start, part.stop)


def _parts(wanted: Shapes) -> list[Shapes]:
    """Parameters that are loaded at once: all, or as many as are larger than `PART_BYTES` together."""
    parts, size = [], PART_BYTES
    for name, leaf in wanted.items():
        if size >= PART_BYTES:
            parts.append({})
            size = 0
        parts[-1][name] = leaf
        size += math.prod(leaf.shape) * leaf.dtype.itemsize
    return parts


def _divides(sharding: jax.sharding.Sharding, shape: tuple[int, ...]) -> bool:
    """Whether a sharding cuts an array of this shape into equal shards."""
    try:
        sharding.shard_shape(shape)
    except ValueError:
        return False
    return True


def refuse_inflated(directory: epath.Path, stored: Shapes) -> None:
    """Raises UserError if a local directory is far smaller than the arrays that its metadata claims, since arrays of
    any size could be claimed."""
    if is_remote(directory):
        return
    claimed = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in stored.values())
    held = sum(file.stat().st_size for file in Path(directory).rglob("*") if file.is_file())
    if claimed > MAX_COMPRESSION * held + 2**26:
        raise UserError(f"{directory}: claims {claimed / 1e9:.1f} GB of parameters, but holds {held / 1e9:.1g} GB")


def is_checkpoint(path: str) -> bool:
    """Whether a path that the user named leads to a checkpoint. Nothing else is read from object stores."""
    remote.name(path)
    return is_remote(path) or any((Path(path) / entry).exists() for entry in (format.DESCRIPTION, format.STEPS))


def open_checkpoint(path: str | os.PathLike) -> Checkpoint:
    """Opens the output of `convert import`, a training workdir (its newest step) or one step's directory.

    Raises UserError if it is none of these.
    """
    path = format.absolute(path)
    if not path.exists():
        raise UserError(f"{path}: no such checkpoint{_other_steps(path)}")
    if (path / "params").exists() and (path / format.DESCRIPTION).exists():
        return Checkpoint(path, path / "params", TREE, format.read_description(path), path / "tokenizer")
    if (path / format.STEPS).exists():
        steps = format.finished_steps(path / format.STEPS)
        if not steps:
            raise UserError(f"{path}: a workdir without a finished checkpoint")
        return _open_step(path / format.STEPS / str(steps[-1]))
    if path.name.isdecimal() and ocp.is_orbax_checkpoint(path):
        return _open_step(path)
    raise UserError(
        f"{path}: neither the output of `convert import` (no {format.DESCRIPTION} and params/) nor a training workdir "
        "(no checkpoints/) nor one step of it"
    )


def open_step(workdir: epath.Path, step: int) -> Checkpoint:
    """The same for a certain step. Raises UserError that lists the steps if it does not exist."""
    path = format.absolute(workdir) / format.STEPS / str(step)
    if not path.exists():
        raise UserError(f"{workdir}: has no step {step}{_other_steps(path)}")
    return _open_step(path)


def _other_steps(path: epath.Path) -> str:
    steps = format.finished_steps(path.parent) if path.parent.name == format.STEPS else []
    return f": the steps there are {', '.join(map(str, steps))}" if steps else ""


def _open_step(path: epath.Path) -> Checkpoint:
    with readable(path):
        found = ocp.checkpointables_metadata(path)
        metadata = dict(found.custom_metadata or {})
    stored = metadata.pop(format.DIGEST, None)  # steps of earlier versions have none
    if "format" not in metadata or stored not in (None, format.digest(metadata)):
        raise damaged(path, "its _CHECKPOINT_METADATA is cut off, altered or missing")
    root = path.parent.parent
    with readable(path):
        description = format.Description.from_json(metadata | _earlier(metadata, root), where=str(path))
    weights = format.EMA if format.EMA in found.metadata else format.PARAMS
    return Checkpoint(root, path, weights, description, root / "tokenizer", step=int(path.name))


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
