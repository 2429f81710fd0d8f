"""Adapters against PEFT: values, gradients, initialization, dropout."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import peft_reference
import pytest
import tiny
import torch
import torch_reference as reference
from flax import nnx
from forward import logits, make_batch, random_images, torch_logits
from peft.tuners.lora.layer import Linear as PeftLinear
from training_runs import random_batches, settings_for

from llava_jax.models import lora
from llava_jax.models.config import LoraConfig
from llava_jax.models.layers import Linear
from llava_jax.models.llava import abstract_params, build
from llava_jax.training import step as training_step

LLM = r"llm\.layers\..*_proj"
EVERYWHERE = ("q_proj", "down_proj", r"vision\.layers\..*(v_proj|out_proj|fc1)", r"projector\.linear_\d")
VARIANTS = {
    "lora": LoraConfig(4, 12.0, (LLM,)),
    "rslora": LoraConfig(4, 3.0, (LLM,), rslora=True),
    "dora": LoraConfig(5, 10.0, (LLM,), dora=True),
    "two targets": LoraConfig(2, 4.0, ("q_proj", "v_proj")),
    "tower and projector": LoraConfig(3, 6.0, EVERYWHERE),
    "dora everywhere": LoraConfig(3, 6.0, EVERYWHERE, rslora=True, dora=True),
}


# ------------------------------------------------------------------------------------------------------ a single layer

# Measured with PEFT 0.21.2.
W = [[1, 0, -1, 2], [0.5, -0.5, 0.25, 0], [-1, 1, 0, 1]]
A = [[1, 0, 0.5, -1], [0, 2, -0.5, 0]]
B = [[0.5, 0], [0, -0.25], [1, 0.5]]
BIAS = [0.1, -0.2, 0.3]
X = [[1, 2, 3, 4], [-1, 0.5, 0, 2]]
START = [2.4494898, 0.75, 1.7320508]  # lengths of the rows of W
VALUES = {
    "lora": ({}, None, [[4.6, -1.2, 4.8], [0.1, -1.45, -1.2]]),
    "rslora": ({"rslora": True}, None, [[3.9786797, -1.7177670, 4.5928936], [-1.1426406, -1.6571068, -3.2710679]]),
    "dora": ({"dora": True}, START, [[4.9107022, -0.6522670, 2.6237900], [0.1, -0.7653338, -0.4745967]]),
    "trained dora": ({"dora": True}, [2, 1, 3], [[4.0279217, -0.8030227, 4.3249226], [0.1, -0.9537784, -1.0416410]]),
}


def adapted_linear(magnitude=None, **options) -> Linear:
    linear = Linear(4, 3, bias=True, rngs=nnx.Rngs(0))
    linear.kernel[...], linear.bias[...] = jnp.array(W, jnp.float32).T, jnp.array(BIAS)
    linear.lora = lora.Lora((4, 3), LoraConfig(2, 4.0, (), **options), rngs=nnx.Rngs(0))
    linear.lora.a[...], linear.lora.b[...] = jnp.array(A, jnp.float32).T, jnp.array(B, jnp.float32).T
    if magnitude is not None:
        linear.lora.magnitude[...] = jnp.array(magnitude, jnp.float32)
    return linear


@pytest.mark.parametrize("variant", VALUES)
def test_values_of_peft(variant):
    options, magnitude, expected = VALUES[variant]
    linear = adapted_linear(magnitude, **options)
    np.testing.assert_allclose(linear(jnp.array(X, jnp.float32)), expected, rtol=0, atol=1e-6)
    # Merged, the kernel computes the same alone.
    adapter = {name: getattr(linear.lora, name)[...] for name in ("a", "b", "magnitude") if getattr(linear.lora, name)}
    kernel = lora.merged(linear.kernel[...], adapter, LoraConfig(2, 4.0, (), **options))
    np.testing.assert_allclose(jnp.array(X) @ kernel + jnp.array([BIAS]), expected, rtol=0, atol=1e-6)
    if variant == "lora":
        np.testing.assert_allclose(kernel.T, [[2, 0, -0.5, 1], [0.5, -1.5, 0.5, 0], [1, 3, 0.5, -1]], atol=1e-6)


def test_gradients_of_peft():
    def gradients(linear):
        return jax.grad(lambda linear: linear(jnp.array(X, jnp.float32)).sum())(linear).lora

    plain = gradients(adapted_linear())
    np.testing.assert_allclose(plain.a[...].T, [[0, 7.5, 9, 18], [0, 1.25, 1.5, 3]], atol=1e-5)
    np.testing.assert_allclose(plain.b[...].T, [[-9, 7]] * 3, atol=1e-5)
    dora = gradients(adapted_linear([2, 1, 3], dora=True))
    expected = [[0, 6.654315, 7.985178, 15.970356], [0, 1.4822896, 1.7787476, 3.5574951]]
    np.testing.assert_allclose(dora.a[...].T, expected, atol=1e-5)
    np.testing.assert_allclose(dora.magnitude[...], [1.963961, -1.356801, 0.8944272], atol=1e-5)


# -------------------------------------------------------------------------------------------------------------- dropout


def with_dropout(rows: int = 2, rate: float = 0.25, seed: int = 0, **options) -> Linear:
    linear = adapted_linear(dropout=rate, **options)
    lora.use_dropout(linear, jax.random.split(jax.random.key(seed), rows), (rows, 1))
    return linear


def mask_of(seeds, shape: tuple[int, int], rate: float) -> np.ndarray:
    """Which inputs of ones are kept; those that are kept are scaled."""
    kept = np.asarray(lora.dropout(jnp.ones((len(seeds), *shape)), jnp.asarray(seeds), rate))
    np.testing.assert_allclose(kept[kept > 0], 1 / (1 - rate), rtol=1e-6)
    return kept > 0


@pytest.mark.parametrize("rate", [0.0, 1e-3, 0.05, 0.5, 0.999])
def test_dropout_drops_its_share_of_every_row_at_every_place(rate):
    seeds = jax.random.bits(jax.random.key(0), (8, 2), jnp.uint32)
    masks = mask_of(seeds, (300, 200), rate)
    for axes in ((1, 2), (0, 1), (0, 2)):  # of a row, of an input, of a position
        share, count = (
            1 - masks.mean(axes),
            masks.size / np.prod([n for i, n in enumerate(masks.shape) if i not in axes]),
        )
        np.testing.assert_allclose(share, rate, rtol=0, atol=5 * (rate * (1 - rate) / count) ** 0.5 + 1e-9)


def test_masks_are_independent_of_each_other():
    """Of rows, of seeds that differ in a bit, of neighbours: as many agree as by chance."""
    seeds = np.asarray(jax.random.bits(jax.random.key(0), (2, 2), jnp.uint32))
    near = [seeds[0], seeds[1], seeds[0] ^ [1, 0], seeds[0] ^ [0, 1], seeds[0] ^ [200, 0], seeds[0] ^ [1 << 31, 0]]
    masks = mask_of(np.array(near, np.uint32), (400, 256), 0.5)
    pairs = [(masks[0], other) for other in masks[1:]]
    pairs += [(masks[:, 1:], masks[:, :-1]), (masks[..., 1:], masks[..., :-1]), (masks[..., 16:], masks[..., :-16])]
    for one, other in pairs:
        assert abs((one == other).mean() - 0.5) < 5 * 0.5 / one.size**0.5


def test_each_layer_row_and_step_has_a_mask_of_its_own():
    config = dataclasses.replace(
        tiny.config(), lora=LoraConfig(2, 4.0, ("q_proj", "k_proj", r"projector\.linear_\d"), dropout=0.5)
    )
    model = build(config, tiny.params(config))
    seeds = []
    for step in (0, 1):
        keys = jax.random.split(jax.random.fold_in(jax.random.key(0), step), 4)
        lora.use_dropout(model, keys, (2, 3))
        attention, projector = model.llm.layers.attention, model.projector
        stacks = [linear.lora.dropout_seeds[...] for linear in (attention.q_proj, attention.k_proj)]
        images = [linear.lora.dropout_seeds[...] for linear in (projector.linear_1, projector.linear_2)]
        assert {x.shape for x in stacks} == {(2, 4, 2)} and {x.shape for x in images} == {(6, 2)}
        seeds += [x.reshape(-1, 2) for x in stacks + images]
        assert attention.v_proj.lora is None
    assert len({tuple(row) for row in np.concatenate(seeds).tolist()}) == 2 * (2 * 2 * 4 + 2 * 6)


class Mask(torch.nn.Module):
    """In place of torch's dropout."""

    def __init__(self, mask: np.ndarray, rate: float):
        super().__init__()
        self.factor = torch.from_numpy(mask / (1 - rate)).float()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


@pytest.mark.parametrize("options", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_dropout_has_the_values_and_gradients_of_peft_with_the_same_mask(options):
    """The base's own branch sees all inputs."""
    ours = with_dropout(**options)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 9, 4)), jnp.float32)
    mask = mask_of(ours.lora.dropout_seeds[...], (9, 4), 0.25)
    assert 0.5 < mask.mean() < 0.95
    base = torch.nn.Linear(4, 3)
    base.weight.data, base.bias.data = torch.tensor(W).float(), torch.tensor(BIAS)
    settings = peft_reference.peft.LoraConfig(
        r=2, lora_alpha=4, lora_dropout=0.25, use_rslora="rslora" in options, use_dora="dora" in options
    )
    theirs = PeftLinear(base, "default", r=2, lora_alpha=4, config=settings)
    theirs.lora_A.default.weight.data, theirs.lora_B.default.weight.data = torch.tensor(A).float(), torch.tensor(B)
    theirs.lora_dropout["default"] = Mask(mask, 0.25)
    if "dora" in options:
        theirs.lora_magnitude_vector["default"].weight.data = torch.tensor([2.0, 1, 3])
        ours.lora.magnitude[...] = jnp.array([2.0, 1, 3])
    inputs = torch.from_numpy(np.array(x)).requires_grad_()
    y = theirs.train()(inputs)
    (y**2).sum().backward()
    np.testing.assert_allclose(ours(x), y.detach().numpy(), rtol=0, atol=1e-5)
    gradients, dx = jax.grad(lambda linear, x: (linear(x) ** 2).sum(), (0, 1), allow_int=True)(ours, x)
    np.testing.assert_allclose(dx, inputs.grad.numpy(), rtol=0, atol=1e-4)
    np.testing.assert_allclose(gradients.lora.a[...].T, theirs.lora_A.default.weight.grad, rtol=0, atol=1e-4)
    np.testing.assert_allclose(gradients.lora.b[...].T, theirs.lora_B.default.weight.grad, rtol=0, atol=1e-4)
    if "dora" in options:
        expected = theirs.lora_magnitude_vector["default"].weight.grad
        np.testing.assert_allclose(gradients.lora.magnitude[...], expected, rtol=0, atol=1e-4)


# ------------------------------------------------------------------------------------------------ initialization, types


def test_fresh_adapters_start_as_those_of_peft():
    """A in +-1/sqrt(in) evenly, B zero."""
    config = LoraConfig(64, 128.0, ())
    ours = lora.Lora((3, 48, 80), config, rngs=nnx.Rngs(0))
    theirs = PeftLinear(
        torch.nn.Linear(48, 80), "default", r=64, lora_alpha=128, config=peft_reference.peft.LoraConfig(r=64)
    )
    for a in (ours.a[...], theirs.lora_A.default.weight.detach().numpy()):
        assert 0.99 * 48**-0.5 < np.abs(a).max() <= 48**-0.5
        np.testing.assert_allclose(np.std(a), 48**-0.5 / 3**0.5, rtol=0.03)
        assert abs(np.mean(a)) < 0.03 * 48**-0.5
    assert len({float(layer[0, 0]) for layer in ours.a[...]}) == 3
    assert not np.any(ours.b[...]) and not theirs.lora_B.default.weight.any()
    assert ours.a.dtype == ours.b.dtype == jnp.float32


def test_bfloat16_sees_small_changes_of_magnitudes():
    """In bfloat16, the ratio 1.003 of a magnitude to its column would be 1."""
    linear = Linear(32, 64, bias=False, rngs=nnx.Rngs(0))
    linear.lora = lora.Lora((32, 64), LoraConfig(2, 4.0, (), dora=True), rngs=nnx.Rngs(0))
    norms = jnp.linalg.norm(linear.kernel[...].astype(jnp.bfloat16).astype(jnp.float32), axis=0)
    x = jax.random.normal(jax.random.key(0), (1, 16, 32), jnp.bfloat16)
    outputs = []
    for factor in (1.0, 1.003):
        linear.lora.magnitude[...] = factor * norms
        outputs.append(np.asarray(linear(x).astype(jnp.float32)))
    assert linear(x).dtype == jnp.bfloat16
    assert np.mean(np.abs(outputs[1]) > np.abs(outputs[0])) > 0.1 and np.all(np.abs(outputs[1]) >= np.abs(outputs[0]))


# ------------------------------------------------------------------------------------------------------ the whole model


@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_those_of_peft(variant):
    module, config = peft_reference.adapted(reference.LLAVA, VARIANTS[variant])
    batch = make_batch([[200, "image", 320], ["image", 4]], random_images(2, 1))
    before = torch_logits(module, batch, config)
    peft_reference.randomize(module)
    expected = torch_logits(module, batch, config)
    actual = logits(config, peft_reference.params(module, config), batch)
    real = batch["segment_ids"] > 0
    assert np.abs(expected - before)[real].max() > 0.5, "the adapters change nothing"
    np.testing.assert_allclose(np.asarray(actual)[real], expected[real], rtol=0, atol=1e-4)


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradients_equal_those_of_peft(variant):
    saved = None if "projector" in variant or "everywhere" in variant else ["multi_modal_projector"]
    module, config = peft_reference.adapted(reference.LLAVA, VARIANTS[variant], modules_to_save=saved)
    peft_reference.randomize(module)
    (batch,) = random_batches(config, 1)
    loss = reference.loss(module, batch, config)
    loss.backward()
    expected = peft_reference.params(module, config, gradients=True)
    params = {name: jnp.asarray(value) for name, value in peft_reference.params(module, config).items()}
    assert params.keys() == abstract_params(config).keys()
    trainable = {name: params.pop(name) for name in expected}
    settings = settings_for(config, batch)
    ours, gradients = jax.jit(training_step.loss_and_gradients, static_argnums=0)(settings, trainable, params, batch)
    np.testing.assert_allclose(ours, loss.item(), rtol=1e-6)
    for name, gradient in expected.items():
        assert np.abs(gradient).max() > 1e-3, name
        np.testing.assert_allclose(gradients[name], gradient, rtol=0, atol=1e-5, err_msg=name)
