"""The loss against its definition over all positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from hypothesis import given
from hypothesis import strategies as st

from llava_jax.models.llava import build
from llava_jax.training import loss


@pytest.fixture(scope="module")
def llm():
    model = tiny.config()
    return build(model, tiny.params(model)).llm


def dense_loss(head, hidden, targets):
    """Mean-free cross-entropy over every position, masked at the end."""
    logits = hidden @ head
    likelihood = jax.nn.log_softmax(logits)[
        jnp.arange(targets.shape[0])[:, None], jnp.arange(targets.shape[1])[None], jnp.maximum(targets, 0)
    ]
    return -jnp.sum(jnp.where(targets == -100, 0, likelihood))


def random_targets(rng, rows, length, learned):
    targets = np.full((rows, length), -100, np.int32)
    for row in targets:
        row[rng.choice(length, learned, replace=False)] = rng.integers(0, tiny.VOCAB, learned)
    return targets


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("spare", [0, 5])
@pytest.mark.parametrize("chunk", [4, 512])
def test_compacted_loss_and_gradient_are_the_dense_ones(llm, groups, spare, chunk, monkeypatch):
    monkeypatch.setattr(loss, "CHUNK", chunk)
    rng = np.random.default_rng(0)
    hidden = jnp.asarray(rng.normal(size=(4, 16, 48)), jnp.float32)
    targets = random_targets(rng, 4, 16, 3)
    slots = 3 * 4 // groups + spare
    head = llm.head(hidden)[0]

    def our_loss(hidden, head):
        return 3 * loss.loss_sum(head, hidden, targets, groups, slots, weight=0.5)

    def their_loss(hidden, head):
        return 1.5 * dense_loss(head, hidden, targets)

    for arguments in (0, 1, (0, 1)):  # with a frozen head, with frozen layers, with neither
        ours = jax.value_and_grad(our_loss, arguments)(hidden, head)
        theirs = jax.value_and_grad(their_loss, arguments)(hidden, head)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=2e-6), ours, theirs)
    np.testing.assert_allclose(our_loss(hidden, head), their_loss(hidden, head), rtol=1e-6)


@given(st.lists(st.integers(-1, 50), min_size=1, max_size=30), st.integers(0, 10))
def test_compaction_keeps_every_target_in_order(labels, spare):
    targets = jnp.asarray([[-100 if label < 0 else label for label in labels]])
    learned = [(i, label) for i, label in enumerate(labels) if label >= 0]
    slots = len(learned) + spare
    if slots:
        position, target = loss.compact(targets, slots)
        assert list(zip(position[0].tolist(), target[0].tolist(), strict=True))[: len(learned)] == learned
        assert (target[0, len(learned) :] == -100).all()


def test_no_target_crosses_into_another_segment():
    labels = jnp.asarray([[1, 2, 3, 4, 5, -100, -100]])
    segments = jnp.asarray([[1, 1, 2, 2, 2, 0, 0]])
    assert loss.next_token_targets(labels, segments).tolist() == [[2, -100, 4, 5, -100, -100, -100]]


def test_logits_exist_only_at_label_slots(llm):
    """The vocabulary projection of 4 x 64 positions would be 16 times that of its 16 targets."""
    targets = random_targets(np.random.default_rng(0), 4, 64, 4)
    hidden = jnp.ones((4, 64, 48))
    flops = {
        name: jax.jit(f).lower(hidden).compile().cost_analysis()["flops"]
        for name, f in {
            "compacted": lambda h: loss.loss_sum(llm.head(h)[0], h, targets, 4, 4),
            "dense": lambda h: dense_loss(llm.head(h)[0], h, targets),
        }.items()
    }
    assert flops["compacted"] < flops["dense"] / 10


def test_a_frozen_head_has_no_gradient_and_logits_are_computed_once(llm, monkeypatch):
    """Products of hidden x head, in chunks of 4 of 16 slots: forward, d hidden and, if it is trained, d head."""
    monkeypatch.setattr(loss, "CHUNK", 4)
    targets = random_targets(np.random.default_rng(0), 4, 64, 4)
    hidden = jnp.ones((4, 64, 48))
    head = llm.head(hidden)[0]

    def products(arguments):
        gradients = jax.grad(lambda h, w: loss.loss_sum(w, h, targets, 1, 16), arguments)
        return str(jax.make_jaxpr(gradients)(hidden, head)).count("dot_general")

    assert (products(0), products((0, 1))) == (2, 3)
