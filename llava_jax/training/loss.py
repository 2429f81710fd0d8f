"""The training objective: equation 3 of the paper, -log p(x_i | X_v, X_instruct,<i, X_a,<i) over answer tokens.

Axes: G groups, R positions of a group's rows, K label slots of a group, D embed, V vocabulary.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from llava_jax.data.tokenization import IGNORE_INDEX
from llava_jax.models.llama import vocabulary_scores

# Slots of a group whose logits are in memory at a time: 512 x 32,000 float32 are 64 MB.
CHUNK = 512


def next_token_targets(labels_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """labels[t + 1] at position t if both are in the same segment, else -100."""
    following = jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    same = jnp.pad(segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1], ((0, 0), (0, 1)))
    return jnp.where(same, following, IGNORE_INDEX)


def compact(targets_GR: jax.Array, label_slots: int) -> tuple[jax.Array, jax.Array]:
    """Positions [G, K] of the targets of each group, in order, and the targets (-100 in empty slots).

    Targets beyond K would be lost: `data.plan.plan_layout` makes K large enough.
    """

    def compact_group(targets_R: jax.Array) -> tuple[jax.Array, jax.Array]:
        is_target = targets_R != IGNORE_INDEX
        slot = jnp.where(is_target, jnp.cumsum(is_target) - 1, label_slots)
        position_K = jnp.zeros(label_slots, jnp.int32).at[slot].set(jnp.arange(targets_R.size), mode="drop")
        filled = jnp.arange(label_slots) < is_target.sum()
        return position_K, jnp.where(filled, targets_R[position_K], IGNORE_INDEX)

    return jax.vmap(compact_group)(targets_GR)


def loss_sum(
    head_DV: jax.Array,
    hidden_BTD: jax.Array,
    targets_BT: jax.Array,
    num_groups: int,
    label_slots: int,
    weight: jax.Array | float = 1.0,
) -> jax.Array:
    """Sum of the cross-entropies of all targets, each times `weight`, float32.

    Most positions are images, questions and padding: the vocabulary projection is computed only for targets.
    """
    G, D = num_groups, hidden_BTD.shape[-1]
    position_GK, target_GK = compact(targets_BT.reshape(G, -1), label_slots)
    # float32, since the gradient of a gather is a scatter-add, which rounds each term.
    hidden_GRD = hidden_BTD.reshape(G, -1, D).astype(jnp.float32)
    hidden_GKD = jax.vmap(lambda hidden_RD, position_K: hidden_RD[position_K])(hidden_GRD, position_GK)
    with jax.named_scope("loss"):
        return cross_entropy(head_DV, hidden_GKD.astype(hidden_BTD.dtype), target_GK, jnp.float32(weight))


@jax.custom_vjp
def cross_entropy(head_DV: jax.Array, hidden_GKD: jax.Array, target_GK: jax.Array, weight: jax.Array) -> jax.Array:
    """`weight` times the sum of -log softmax(logits)[target] where the target is not -100.

    Logits are computed once, for at most `CHUNK` slots of a group at a time. The gradients are computed with the loss:
    so neither the logits nor the gathered head, to compute them again, are kept until the backward pass.
    """

    def add(total: jax.Array, chunk: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, None]:
        return total + chunk_loss(head_DV, *chunk, weight), None

    return jax.lax.scan(add, jnp.float32(0), _chunks(hidden_GKD, target_GK))[0]


def chunk_loss(head_DV: jax.Array, hidden_GCD: jax.Array, target_GC: jax.Array, weight: jax.Array) -> jax.Array:
    """The same for one chunk, [G, C]."""
    logits = vocabulary_scores(hidden_GCD, head_DV)
    target = jnp.maximum(target_GC, 0)[..., None]
    log_likelihood = jnp.take_along_axis(logits, target, axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return -weight * jnp.sum(jnp.where(target_GC == IGNORE_INDEX, 0.0, log_likelihood))


def _forward(head: Any, hidden: Any, target: Any, weight: Any) -> tuple[jax.Array, tuple[jax.Array | None, jax.Array]]:
    """The loss and, as residuals, its gradients with respect to the head (None if it is frozen) and to `hidden`."""
    head_DV, hidden_GKD, trained = head.value, hidden.value, head.perturbed

    def add(carry: tuple, chunk: tuple[jax.Array, jax.Array]) -> tuple[tuple, jax.Array]:
        total, d_head_DV = carry
        hidden_GCD, target_GC = chunk
        loss = functools.partial(chunk_loss, target_GC=target_GC, weight=weight.value)
        if trained:
            value, (d_chunk_DV, d_hidden_GCD) = jax.value_and_grad(loss, argnums=(0, 1))(head_DV, hidden_GCD)
            d_head_DV += d_chunk_DV
        else:
            value, d_hidden_GCD = jax.value_and_grad(loss, argnums=1)(head_DV, hidden_GCD)
        return (total + value, d_head_DV), d_hidden_GCD

    start = (jnp.float32(0), jnp.zeros(head_DV.shape, jnp.float32) if trained else None)
    (total, d_head_DV), d_hidden = jax.lax.scan(add, start, _chunks(hidden_GKD, target.value))
    G, K, D = hidden_GKD.shape
    d_hidden_GKD = d_hidden.swapaxes(0, 1).reshape(G, -1, D)[:, :K]
    return total, (d_head_DV.astype(head_DV.dtype) if trained else None, d_hidden_GKD)


def _backward(gradients: tuple[jax.Array | None, jax.Array], d_loss: jax.Array) -> tuple:
    d_head_DV, d_hidden_GKD = jax.tree.map(lambda gradient: (d_loss * gradient).astype(gradient.dtype), gradients)
    return d_head_DV, d_hidden_GKD, None, None


cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunks(hidden_GKD: jax.Array, target_GK: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Chunks of C <= `CHUNK` slots, [K / C, G, C, D] and [K / C, G, C]; the last one is padded with -100."""
    G, K, D = hidden_GKD.shape
    C = min(K, CHUNK)
    hidden_GKD = jnp.pad(hidden_GKD, ((0, 0), (0, -K % C), (0, 0)))
    target_GK = jnp.pad(target_GK, ((0, 0), (0, -K % C)), constant_values=IGNORE_INDEX)
    return hidden_GKD.reshape(G, -1, C, D).swapaxes(0, 1), target_GK.reshape(G, -1, C).swapaxes(0, 1)
