"""The training objective: equation 3 of the paper, -log p(x_i | X_v, X_instruct,<i, X_a,<i) over answer tokens.

Axes: G groups, R positions of a group's rows, K label slots of a group, D embed, V vocabulary.
"""

import jax
import jax.numpy as jnp

from llava_jax.models.llama import vocabulary_scores

IGNORE_INDEX = -100
# Slots of a group whose logits exist at a time: 512 x 32,000 float32 are 64 MB.
CHUNK = 512


def next_token_targets(labels_BT: jax.Array, segment_ids_BT: jax.Array) -> jax.Array:
    """Position t predicts labels[t + 1] where that is of the same segment; -100 elsewhere."""
    following = jnp.pad(labels_BT[:, 1:], ((0, 0), (0, 1)), constant_values=IGNORE_INDEX)
    same = jnp.pad(segment_ids_BT[:, 1:] == segment_ids_BT[:, :-1], ((0, 0), (0, 1)))
    return jnp.where(same, following, IGNORE_INDEX)


def compact(targets_GR: jax.Array, label_slots: int) -> tuple[jax.Array, jax.Array]:
    """Positions [G, K] of the targets of each group, in order, and these targets (-100 in empty slots).

    Targets beyond K would be lost, which is why K is planned.
    """

    def compact_group(targets_R: jax.Array) -> tuple[jax.Array, jax.Array]:
        learned = targets_R != IGNORE_INDEX
        slot = jnp.where(learned, jnp.cumsum(learned) - 1, label_slots)
        position_K = jnp.zeros(label_slots, jnp.int32).at[slot].set(jnp.arange(targets_R.size), mode="drop")
        filled = jnp.arange(label_slots) < learned.sum()
        return position_K, jnp.where(filled, targets_R[position_K], IGNORE_INDEX)

    return jax.vmap(compact_group)(targets_GR)


def loss_sum(
    head_DV: jax.Array, hidden_BTD: jax.Array, targets_BT: jax.Array, num_groups: int, label_slots: int
) -> jax.Array:
    """Sum of the cross-entropies of all targets, float32.

    Most positions are images, questions and padding: the vocabulary projection is computed only where there is a
    target, and for at most `CHUNK` of a group's slots at a time.
    """
    G, D = num_groups, hidden_BTD.shape[-1]
    position_GK, target_GK = compact(targets_BT.reshape(G, -1), label_slots)
    # float32, since the gradient of a gather is a scatter-add that would round at every term.
    hidden_GRD = hidden_BTD.reshape(G, -1, D).astype(jnp.float32)
    hidden_GKD = jax.vmap(lambda hidden_RD, position_K: hidden_RD[position_K])(hidden_GRD, position_GK)
    hidden_GKD = hidden_GKD.astype(hidden_BTD.dtype)
    with jax.named_scope("loss"):
        if label_slots <= CHUNK:
            return cross_entropy_sum(head_DV, hidden_GKD, target_GK)
        return chunked_cross_entropy_sum(head_DV, hidden_GKD, target_GK)


def chunked_cross_entropy_sum(head_DV: jax.Array, hidden_GKD: jax.Array, target_GK: jax.Array) -> jax.Array:
    """The same in chunks of K, whose logits are computed again in the backward pass instead of kept."""
    G, K, D = hidden_GKD.shape
    padding = -K % CHUNK
    hidden_GKD = jnp.pad(hidden_GKD, ((0, 0), (0, padding), (0, 0)))
    target_GK = jnp.pad(target_GK, ((0, 0), (0, padding)), constant_values=IGNORE_INDEX)
    chunks = (
        hidden_GKD.reshape(G, -1, CHUNK, D).swapaxes(0, 1),
        target_GK.reshape(G, -1, CHUNK).swapaxes(0, 1),
    )
    step = jax.checkpoint(lambda total, chunk: (total + cross_entropy_sum(head_DV, *chunk), None))
    return jax.lax.scan(step, jnp.float32(0), chunks)[0]


def cross_entropy_sum(head_DV: jax.Array, hidden: jax.Array, targets: jax.Array) -> jax.Array:
    """hidden [..., D], targets [...] -> the sum of -log softmax(logits)[target] where the target is not -100."""
    logits = vocabulary_scores(hidden, head_DV)
    target = jnp.maximum(targets, 0)[..., None]
    log_likelihood = jnp.take_along_axis(logits, target, axis=-1)[..., 0] - jax.nn.logsumexp(logits, axis=-1)
    return -jnp.sum(jnp.where(targets == IGNORE_INDEX, 0.0, log_likelihood))
