"""What a run compiles: the settings, shapes, shardings and jitted step, made in one place.

`train` uses it on the first start and on every resume, and `preflight` compiles the same program for hardware you
don't have. Nothing here allocates parameters or batches.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from llava_jax.cli import UserError
from llava_jax.data.pipeline import PADDING
from llava_jax.data.plan import Layout
from llava_jax.models import pieces
from llava_jax.models.attention import choose_backend
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import Params, Shapes, abstract_params, used_params
from llava_jax.models.lora import PARAMETER
from llava_jax.models.quantized import kept_dtype, refuse_trained
from llava_jax.parallel import sharding
from llava_jax.training import flops, optim
from llava_jax.training.step import StepSettings, TrainState, eval_step, train_step


@dataclasses.dataclass(frozen=True)
class TrainingProgram:
    """The training step of a run, ready to be compiled. The arguments are shapes with types and shardings."""

    settings: StepSettings
    optimizer: optax.GradientTransformation
    state: TrainState
    frozen: Shapes
    batch: Shapes
    groups: dict[str, optim.Group]  # of the trained parameters, see `optim.trained`

    @property
    def arguments(self) -> tuple[TrainState, Shapes, Shapes]:
        """The arguments of the step."""
        return self.state, self.frozen, self.batch

    @property
    def flops(self) -> dict[str, flops.Part]:
        """FLOPs of a step by part of the model, see `flops.step_flops`."""
        settings = self.settings
        passes = settings.accumulation * sharding.batch_shards(settings.mesh)
        return flops.step_flops(settings.model, settings.layout, self.state.trainable, settings.remat, passes)

    def lower(self) -> jax.stages.Lowered:
        """The step as StableHLO, which `.compile()` makes an executable of."""
        return jit_step(self.settings, self.optimizer, self.state).lower(*self.arguments)

    def evaluation(self) -> Callable:
        """`eval_step`, jitted: (trainable, frozen, batch) -> (sum of the losses, number of targets)."""
        return jax.jit(functools.partial(eval_step, self.settings))


def build(
    config: ConfigDict,
    model: LlavaConfig,
    layout: Layout,  # the shapes of the batches
    mesh: Mesh,  # the devices to run on or, for ahead-of-time compilation, those of a topology
    steps: int,  # the length of the learning rate schedule
    # Shapes and types of the parameters in the checkpoint; by default those of a float32 checkpoint.
    stored: Shapes | None = None,
    # Whether parameters that no feature depends on may be trained, as earlier versions did.
    trains_unused: bool = False,
) -> TrainingProgram:
    """The program of a run. Raises UserError if the configuration doesn't fit the mesh or the batches."""
    stored = abstract_params(model) | (stored or {})  # new adapters are in no checkpoint
    settings = step_settings(config, model, layout, mesh)
    sharding.check_replicated(mesh, stored)
    groups = optim.trained(stored if trains_unused else used_params(model, stored), config)
    refuse_trained(groups)
    _require_trained_adapters(stored, groups)
    cuts = pieces.cuts(groups)
    if model.base_dtype and "llm.layers" in cuts:
        raise UserError(f"config.trainable: only all layers of a language model in {model.base_dtype} can be trained")
    stored = pieces.split(stored, cuts)
    optimizer = optim.make_optimizer(config, groups, steps, optim.layer_scales(groups, model), mesh)
    state = abstract_state(optimizer, stored, groups, mesh, ema=bool(config.ema))
    frozen_dtype = config.frozen_dtype or ("" if _platform(mesh) == "cpu" else "bfloat16")  # "" loads them as stored
    llm_dtype = "bfloat16" if config.base_dtype == "bfloat16" else frozen_dtype
    dtypes = {
        name: jnp.dtype(
            kept_dtype(name, leaf.dtype, (llm_dtype if name.startswith("llm.") else frozen_dtype) or leaf.dtype)
        )
        for name, leaf in stored.items()
        if name not in state.trainable
    }
    frozen, batch = abstract_placed(dtypes, stored, mesh), abstract_batch(settings)
    return TrainingProgram(settings, optimizer, state, frozen, batch, groups)


def _require_trained_adapters(stored: Iterable[str], trained: Iterable[str]) -> None:
    whole = {pieces.whole(name) for name in trained}
    if idle := next((name for name in stored if PARAMETER.fullmatch(name) and name not in whole), None):
        raise UserError(
            f"config.trainable: no pattern trains the adapter {idle}: add ({optim.PATTERNS['lora']!r}, 'lora')"
        )


# ------------------------------------------------------------------------------------------------------- the settings


def step_settings(config: ConfigDict, model: LlavaConfig, layout: Layout, mesh: Mesh) -> StepSettings:
    """What a configuration compiles to on a mesh."""
    platform = _platform(mesh)
    packed = config.pack
    dtype = jnp.dtype(config.compute_dtype or ("float32" if platform == "cpu" else "bfloat16"))
    if config.attention == "cudnn" and packed:
        raise UserError(
            "config.attention=cudnn attends across the samples of packed rows: set attention=chunked, or pack=False"
        )
    if config.attention == "cudnn" and dtype != jnp.bfloat16:
        raise UserError(f"config.attention=cudnn needs bfloat16, not {dtype}: set compute_dtype, or attention=chunked")
    attention = config.attention or choose_backend(platform, packed, dtype)
    # cuDNN has no backward pass for an odd number of tokens with a bias, which CLIP's class token makes.
    if attention == "cudnn" and model.vision.num_tokens % 2 and _trains_tower(config, model):
        if config.attention:
            raise UserError(
                f"config.attention=cudnn cannot train a vision tower with an odd number of tokens "
                f"({model.vision.num_tokens}): set attention=chunked"
            )
        attention = "chunked"
    return StepSettings(
        model=model,
        layout=layout,
        mesh=mesh,
        dtype=dtype,
        attention=attention,
        packed=packed,
        remat=config.remat,
        accumulation=accumulation_steps(config, layout, mesh),
        seed=config.seed,
        ema=config.ema,
    )


def _trains_tower(config: ConfigDict, model: LlavaConfig) -> bool:
    groups = optim.trained(used_params(model, abstract_params(model)), config)
    return any(name.startswith("vision.") for name in groups)


def accumulation_steps(config: ConfigDict, layout: Layout, mesh: Mesh) -> int:
    """Microbatches of a step: the fewest that `max_rows_per_device` allows."""
    shards = sharding.batch_shards(mesh)
    limit = config.max_rows_per_device or config.batch_rows
    accumulation = math.ceil(config.batch_rows / (limit * shards))
    if layout.groups % (shards * accumulation):
        raise UserError(
            f"batch_rows={layout.batch_rows} in groups of {layout.rows_per_group} makes {layout.groups} groups, not a "
            f"multiple of {shards} devices x {accumulation} accumulated microbatches; "
            "change batch_rows, rows_per_group or max_rows_per_device"
        )
    return accumulation


def _platform(mesh: Mesh) -> str:
    return mesh.devices.flat[0].platform


# ---------------------------------------------------------------------------------------- shapes, types and shardings


def abstract_state(
    optimizer: optax.GradientTransformation,
    shapes: Mapping[str, Any],
    names: Iterable[str],
    mesh: Mesh,
    ema: bool = False,
) -> TrainState:
    """Shapes, types and shardings of the state that trains the parameters `names`, whose shapes are in `shapes`.

    The optimizer's state and the moving average, which `ema` asks for, are sharded like the parameters.
    """
    trainable = abstract_placed(dict.fromkeys(names, jnp.float32), shapes, mesh)
    moments = jax.eval_shape(optimizer.init, trainable)
    shardings = sharding.tree_shardings(mesh, moments, trainable)
    moments = jax.tree.map(lambda leaf, sharding: leaf.update(sharding=sharding), moments, shardings)
    step = jax.ShapeDtypeStruct((), jnp.int32, sharding=sharding.replicated(mesh))
    return TrainState(step, trainable, moments, trainable if ema else None)


def abstract_placed(dtypes: Mapping[str, jnp.dtype], shapes: Mapping[str, Any], mesh: Mesh) -> Shapes:
    """Parameters by name in these types, with the shapes of `shapes`, sharded over the mesh."""
    return {
        name: jax.ShapeDtypeStruct(
            shapes[name].shape, dtype, sharding=sharding.param_sharding(mesh, name, shapes[name].shape)
        )
        for name, dtype in dtypes.items()
    }


def abstract_batch(settings: StepSettings) -> Shapes:
    """Shapes, types and shardings of the batches, see `data.pipeline.Batches`."""
    layout, rows = settings.layout, sharding.batch_sharding(settings.mesh)
    text = jax.ShapeDtypeStruct((layout.batch_rows, layout.max_length), jnp.int32, sharding=rows)
    shape = (layout.groups, layout.image_slots, layout.image_size, layout.image_size, 3)
    return dict.fromkeys(PADDING, text) | {"images": jax.ShapeDtypeStruct(shape, jnp.uint8, sharding=rows)}


def init_state(optimizer: optax.GradientTransformation, trainable: Params, mesh: Mesh, ema: bool = False) -> TrainState:
    """Step 0 with these parameters; the optimizer's state is created with the shardings of `abstract_state`."""
    like = abstract_state(optimizer, trainable, trainable, mesh)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, like.optimizer)
    optimizer_state = jax.jit(optimizer.init, out_shardings=shardings)(trainable)
    average = jax.tree.map(jnp.copy, trainable) if ema else None  # a step reuses the buffers of both
    return TrainState(jax.device_put(jnp.int32(0), like.step.sharding), trainable, optimizer_state, average)


def jit_step(settings: StepSettings, optimizer: optax.GradientTransformation, state: TrainState) -> Callable:
    """`train_step`, jitted. The new state has the shardings of `state` (arrays or shapes), whose buffers it reuses."""
    shardings = jax.tree.map(lambda leaf: leaf.sharding, state)
    replicated = sharding.replicated(settings.mesh)
    return jax.jit(
        functools.partial(train_step, settings, optimizer),
        out_shardings=(shardings, {"loss": replicated, "grad_norm": replicated}),
        donate_argnums=0,
    )
