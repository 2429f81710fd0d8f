"""How a forward pass is carried out: attention backend, rematerialization, sharding. Results do not depend on it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import PartitionSpec as P

from llava_jax.models.attention import attention
from llava_jax.models.pieces import first_layers
from llava_jax.parallel.sharding import Fsdp

Carry = TypeVar("Carry")  # an array or a tree of them
# Names of activations in remat policies.
LAYER_INPUT, QKV = "layer_input", "qkv"


def everything_but_gathered_weights(primitive: Any, *_: Any, **parameters: Any) -> bool:
    """Remat policy that keeps all results but those of all-gathers, which would be the unsharded model."""
    inside = parameters["call_jaxpr"].eqns if "call_jaxpr" in parameters else ()
    return jax.lax.all_gather_p not in (primitive, *(equation.primitive for equation in inside))


# What is kept of a layer for the backward pass; everything else is computed again (Chen et al. 2016).
REMAT_POLICIES: dict[str, Callable] = {
    "none": everything_but_gathered_weights,
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_qkv": jax.checkpoint_policies.save_only_these_names(QKV),
    # As `full`, with the inputs of the layers in the memory of the host.
    "offload": jax.checkpoint_policies.save_and_offload_only_these_names(
        names_which_can_be_saved=[],
        names_which_can_be_offloaded=[LAYER_INPUT],
        offload_src="device",
        offload_dst="pinned_host",
    ),
}


@dataclasses.dataclass(frozen=True)
class Execution:
    """Attention backend, remat policy, and sharding of the parameters."""

    attention: str = "xla"  # backend, see `models.attention`
    packed: bool = True  # whether a row may have several samples
    remat: str = "none"  # what a layer keeps for the backward pass, see `REMAT_POLICIES`
    fsdp: Fsdp | None = None  # how sharded parameters are gathered; None if every device has all of them
    tensor: int = 1  # devices that the heads are split over

    def gather(self, prefix: str, module: Any) -> Any:
        """The module with this name (`prefix`), with its weights gathered from the devices that hold their shards."""
        return module if self.fsdp is None else self.fsdp.gather(prefix, module)

    def gather_after(self, prefix: str, module: Any, x: jax.Array) -> tuple[Any, jax.Array]:
        """As `gather`, but after `x` is computed, and with its gradient sharded before that of `x` is used.

        Otherwise the largest weights would be in memory together with the activations of the layers.
        """
        if self.fsdp is None:
            return module, x
        module, x = jax.lax.optimization_barrier((module, x))
        return self.gather(prefix, module), x

    def lookup(self, name: str, embedding: Any, tokens_BT: jax.Array) -> jax.Array:
        """`embedding(tokens)`, whose table (`name`) may be sharded."""
        return embedding(tokens_BT) if self.fsdp is None else self.fsdp.lookup(name, embedding, tokens_BT)

    def attend(
        self,
        q_BTNH: jax.Array,
        k_BTKH: jax.Array,
        v_BTKH: jax.Array,
        segment_ids_BT: jax.Array | None = None,
        window: int | None = None,
    ) -> jax.Array:
        """`models.attention.attention`, in which each device computes its heads."""
        local = functools.partial(attention, window=window, backend=self.attention, packed=self.packed)
        if self.tensor == 1:
            return local(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)
        # The compiler cannot split kernels: if the heads do not divide, every device computes all of them.
        heads = P() if k_BTKH.shape[2] % self.tensor else P(None, None, "tensor")
        sharded = jax.shard_map(
            local, in_specs=(heads, heads, heads, P()), out_specs=heads, axis_names={"tensor"}, check_vma=False
        )
        return sharded(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT)

    def scan_layers(self, step: Callable[[Carry, Any], Carry], x: Carry, layers: Any, count: int) -> Carry:
        """x = step(x, layer) for the first `count` of the stacked layers, which keep what the remat policy says."""
        if self.remat != "none" or self.fsdp is not None:
            step = jax.checkpoint(step, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        for stack in first_layers(layers, count):
            x = jax.lax.scan(lambda x, layer: (step(x, layer), None), x, stack)[0]
        return x


SINGLE = Execution()
