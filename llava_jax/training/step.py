"""The training step: the mean loss over the target tokens of a batch (equation 3 of the paper), gradients, an update.

`builder` makes the settings and compiles the step.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from llava_jax.data.pipeline import Batch
from llava_jax.data.plan import Layout
from llava_jax.data.tokenization import IGNORE_INDEX
from llava_jax.models import pieces
from llava_jax.models.config import LlavaConfig
from llava_jax.models.execution import Execution
from llava_jax.models.llava import Params, abstract_params, build_from_shards
from llava_jax.models.lora import use_dropout
from llava_jax.parallel import sharding
from llava_jax.training.loss import loss_sum, next_token_targets

DROPOUT = "dropout_keys"  # in a batch: a key for each row


class TrainState(NamedTuple):
    """What a step updates."""

    step: jax.Array  # int32, steps done
    trainable: Params  # float32
    optimizer: optax.OptState
    ema: Params | None = None  # the moving average of `trainable`, float32, if there is one

    @property
    def weights(self) -> Params:
        """The trained parameters to evaluate: their moving average, if there is one."""
        return self.trainable if self.ema is None else self.ema


@dataclasses.dataclass(frozen=True)
class StepSettings:
    """What is compiled into a step."""

    model: LlavaConfig
    layout: Layout
    mesh: Mesh
    dtype: jnp.dtype = jnp.float32
    attention: str = "xla"
    packed: bool = True
    remat: str = "none"
    accumulation: int = 1
    seed: int = 0  # of dropout
    ema: float = 0.0  # the decay of the moving average; 0 is off

    @functools.cached_property
    def param_specs(self) -> dict[str, P]:
        """The mesh axes that shard each parameter of the model."""
        return {name: sharding.param_spec(self.mesh, name, v.shape) for name, v in abstract_params(self.model).items()}

    def manual_specs(self, names: Iterable[str]) -> dict[str, P]:
        """The same for `jax.shard_map`, without `tensor`, over which the compiler shards."""
        return {name: P(*(axis if axis != "tensor" else None for axis in self.spec(name))) for name in names}

    def spec(self, name: str) -> P:
        """The mesh axes that shard a parameter or a piece of it."""
        return self.param_specs[pieces.whole(name)]

    @property
    def execution(self) -> Execution:
        fsdp = sharding.Fsdp(self.param_specs, self.dtype) if sharding.axis_sizes(self.mesh)["fsdp"] > 1 else None
        return Execution(self.attention, self.packed, self.remat, fsdp, self.mesh.shape["tensor"])


def batch_loss(
    settings: StepSettings, trainable: Params, frozen: Params, batch: Batch, weight: jax.Array | float = 1.0
) -> jax.Array:
    """Sum over the target tokens of -log p(x_i | X_v, X_instruct,<i, X_a,<i), each times `weight`: equation 3.

    This is what each device computes, from its rows of a (micro)batch and its shards of the parameters.
    """
    model, execution = build_from_shards(settings.model, trainable | frozen, settings.dtype), settings.execution
    if DROPOUT in batch:
        use_dropout(model, batch[DROPOUT], batch["images"].shape[:2])
    hidden_BTD = model(batch, execution)
    targets_BT = next_token_targets(batch["labels"], batch["segment_ids"])
    head_DV, hidden_BTD = model.llm.head(hidden_BTD, execution)
    return loss_sum(head_DV, hidden_BTD, targets_BT, batch["images"].shape[0], settings.layout.label_slots, weight)


def count_targets(batch: Batch) -> jax.Array:
    """The number of target tokens in all rows of all devices."""
    targets_BT = next_token_targets(batch["labels"], batch["segment_ids"])
    return sharding.sum_over(sharding.BATCH_AXES, jnp.sum(targets_BT != IGNORE_INDEX))


def loss_and_gradients(
    settings: StepSettings, trainable: Params, frozen: Params, batch: Batch, step: jax.Array | int = 0
) -> tuple[jax.Array, Params]:
    """The mean loss over the target tokens of the batch and its gradients, for any mesh and accumulation.

    Seed and number of the `step` decide which inputs adapters drop. Returns float32[] and the gradients by name,
    float32, sharded like the parameters.
    """
    if settings.model.lora and settings.model.lora.dropout:
        key = jax.random.fold_in(jax.random.key(settings.seed), step)
        rows_B = jnp.arange(settings.layout.batch_rows)
        batch = batch | {DROPOUT: jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)}
    out_specs = (P(), settings.manual_specs(trainable))
    on_devices = on_each_device(_loss_and_gradients, settings, trainable, frozen, out_specs)
    loss, gradients = on_devices(trainable, frozen, batch)
    return loss, jax.tree.map(lambda gradient: gradient.astype(jnp.float32), gradients)


def _loss_and_gradients(
    settings: StepSettings, trainable: Params, frozen: Params, batch: Batch
) -> tuple[jax.Array, Params]:
    """What each device does for it, with its rows and its shards of the parameters."""
    weight = 1 / jnp.maximum(count_targets(batch), 1)  # the mean over the batch, also where it is accumulated

    # A weight sharded over `fsdp` is float32, and so would be its gradient. Its gradient accumulator is an array of
    # zeros of the same shape, in the type in which gradients are summed. The loss is differentiated with respect to
    # the accumulator, to which the backward pass of `gather_weight` gives the gradient of the weight. So the gradients
    # of all layers take half the memory and lose no bit; the zeros are never read, and the compiler drops them.
    fsdp = settings.execution.fsdp
    gathered = {name for name in trainable if fsdp and fsdp.gathers(pieces.whole(name))}
    variables = {n: jnp.zeros_like(w, settings.dtype) if n in gathered else w for n, w in trainable.items()}

    def mean_loss(variables: Params, batch: Batch) -> jax.Array:
        sharded = {name: sharding.ShardedWeight(trainable[name], variables[name]) for name in gathered}
        return batch_loss(settings, variables | sharded, frozen, batch, weight)

    if settings.accumulation == 1:
        loss, gradients = jax.value_and_grad(mean_loss)(variables, batch)
    else:

        def add(total: Any, microbatch: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, jax.value_and_grad(mean_loss)(variables, microbatch)), None

        zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
        loss, gradients = jax.lax.scan(add, zero, _microbatches(settings, batch))[0]

    # So far a gradient is summed over the rows of one device or, if the weight was gathered, over those along `fsdp`.
    def unsummed_axes(name: str) -> Iterable[str]:
        return ["data"] if sharding.FSDP_RINGS in settings.spec(name) else sharding.BATCH_AXES

    summed = {name: sharding.sum_over(unsummed_axes(name), gradient) for name, gradient in gradients.items()}
    return sharding.sum_over(sharding.BATCH_AXES, loss), summed


def _microbatches(settings: StepSettings, batch: Batch) -> Batch:
    """The rows of a device, [R, ...], as those that it computes at once: [A, R / A, ...]."""
    A = settings.accumulation
    return jax.tree.map(lambda x: x.reshape(A, x.shape[0] // A, *x.shape[1:]), batch)


def on_each_device(
    function: Callable, settings: StepSettings, trainable: Params, frozen: Params, out_specs: Any
) -> Callable:
    """`function(settings, trainable, frozen, batch)` as every device runs it, on its shards and its rows."""
    return jax.shard_map(
        functools.partial(function, settings),
        mesh=settings.mesh,
        in_specs=(settings.manual_specs(trainable), settings.manual_specs(frozen), P(sharding.BATCH_AXES)),
        out_specs=out_specs,
        axis_names=sharding.manual_axes(settings.mesh),
        check_vma=False,  # kernels don't support it; `_loss_and_gradients` does all sums itself
    )


def train_step(
    settings: StepSettings, optimizer: optax.GradientTransformation, state: TrainState, frozen: Params, batch: Batch
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Loss, gradients, update. Frozen parameters have no gradients and no part in the gradient norm."""
    loss, gradients = loss_and_gradients(settings, state.trainable, frozen, batch, state.step)
    updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.trainable)
    trainable = optax.apply_updates(state.trainable, updates)
    ema = optax.incremental_update(trainable, state.ema, 1 - settings.ema) if settings.ema else None
    metrics = {"loss": loss, "grad_norm": optax.global_norm(gradients)}
    return TrainState(state.step + 1, trainable, optimizer_state, ema), metrics


def eval_step(settings: StepSettings, trainable: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    """Sum of the losses and number of target tokens of a batch, as many rows at once as in training."""

    def total(settings: StepSettings, trainable: Params, frozen: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
        def add(loss: jax.Array, microbatch: Batch) -> tuple[jax.Array, None]:
            return loss + batch_loss(settings, trainable, frozen, microbatch), None

        loss, _ = jax.lax.scan(add, jnp.float32(0), _microbatches(settings, batch))
        return sharding.sum_over(sharding.BATCH_AXES, loss), count_targets(batch)

    return on_each_device(total, settings, trainable, frozen, (P(), P()))(trainable, frozen, batch)
