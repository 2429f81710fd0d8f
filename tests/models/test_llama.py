"""The decoder against transformers, and against itself packed, padded and cached."""

import dataclasses
import functools
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import torch_reference as reference
import transformers
from flax import nnx
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding, apply_rotary_pos_emb

from llava_jax.convert.names import to_ours
from llava_jax.models.attention import causal_segment_mask
from llava_jax.models.config import LLAMA_7B, LLAMA_13B, RopeScaling, TextConfig
from llava_jax.models.families import family_of
from llava_jax.models.families.gemma3_text import Gemma3Config
from llava_jax.models.llama import Llama, LlamaLayer, rotary_frequencies, rotate

CONFIG = reference.TEXT


@functools.cache
def graph(config: TextConfig) -> tuple[nnx.GraphDef, nnx.State]:
    return nnx.split(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))


def decoder(params: dict, config: TextConfig = CONFIG) -> Llama:
    graphdef, state = graph(config)
    values = {tuple(name.removeprefix("llm.").split(".")): nnx.Param(jnp.asarray(x)) for name, x in params.items()}
    assert set(values) == {path for path, _ in nnx.to_flat_state(state)}
    return nnx.merge(graphdef, nnx.from_flat_state(list(values.items())))


def pair(config: TextConfig = CONFIG) -> tuple[transformers.LlamaForCausalLM, Llama]:
    """The same random weights in torch and here."""
    torch_model = reference.llama(config)
    return torch_model, decoder(reference.llama_params(torch_model, config), config)


def decoder_without_weights() -> Llama:
    return nnx.merge(*graph(CONFIG))


def random_tokens(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, CONFIG.vocab_size, shape)


def arange_rows(tokens: np.ndarray) -> jax.Array:
    return jnp.broadcast_to(jnp.arange(tokens.shape[1])[None], tokens.shape)


@nnx.jit
def forward(model, tokens, positions, segment_ids):
    return model.logits(model(model.embed_tokens(tokens), positions, segment_ids))


def our_logits(model, tokens, positions=None, segment_ids=None) -> np.ndarray:
    positions = arange_rows(tokens) if positions is None else positions
    segment_ids = jnp.ones(tokens.shape, jnp.int32) if segment_ids is None else segment_ids
    return np.asarray(forward(model, jnp.asarray(tokens), positions, segment_ids))


@torch.no_grad()
def torch_logits(model, tokens, **inputs) -> np.ndarray:
    inputs = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
    logits = model(input_ids=torch.from_numpy(tokens), **inputs).logits.numpy()
    assert logits.std() > 0.5  # else small differences would mean nothing
    return logits


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_logits_equal_transformers(kv_heads, tied):
    torch_model, model = pair(dataclasses.replace(CONFIG, num_kv_heads=kv_heads, tie_word_embeddings=tied))
    tokens = random_tokens(2, 17)
    np.testing.assert_allclose(our_logits(model, tokens), torch_logits(torch_model, tokens), rtol=0, atol=2e-5)


LONG = reference.TEXTS | {
    "llama 3.2": dataclasses.replace(reference.TEXTS["llama3"], tie_word_embeddings=True),
    "theta 1e4": dataclasses.replace(CONFIG, rope_theta=1e4),
    "theta 1e6": dataclasses.replace(CONFIG, rope_theta=1e6),
}


@pytest.mark.parametrize("name", LONG)
def test_500_tokens_of_every_family_equal_transformers(name):
    torch_model, model = pair(LONG[name])
    tokens = random_tokens(1, 500)
    # Torch's frequencies are one unit of float32 off for some thetas: 3e-5 rad at position 500.
    np.testing.assert_allclose(our_logits(model, tokens), torch_logits(torch_model, tokens), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["linear", "llama3", "mistral", "qwen2", "qwen3", "phi3"]
)  # Gemma 3 has other parameters
def test_what_tells_a_family_apart_matters(name):
    """So that the test above would notice its absence."""
    config, tokens = reference.TEXTS[name], random_tokens(1, 500)
    params = reference.llama_params(reference.llama(config), config)
    plain = {name: value for name, value in params.items() if not re.search(r"bias$|\b[qk]_norm\b", name)}
    without = dataclasses.replace(CONFIG, head_dim=config.head_dim)
    changes = our_logits(decoder(params, config), tokens) - our_logits(decoder(plain, without), tokens)
    assert np.abs(changes).max() > 0.1


def test_rotary_frequencies_equal_those_of_llama_3_1():
    """Of the published sizes, where all three of its cases occur."""
    config = dataclasses.replace(
        CONFIG, head_dim=128, rope_theta=5e5, rope_scaling=RopeScaling("llama3", 8.0, 8192, 1.0, 4.0)
    )
    expected = LlamaRotaryEmbedding(reference.torch_text_config(config)).inv_freq.numpy()
    plain = rotary_frequencies(config, config.spans[0]._replace(scaling=None))
    ratio = np.asarray(rotary_frequencies(config, config.spans[0]) / plain)
    assert (ratio == 1).sum() > 20 and np.isclose(ratio, 1 / 8).sum() > 20 and len(np.unique(ratio.round(3))) > 5
    np.testing.assert_allclose(rotary_frequencies(config, config.spans[0]), expected, rtol=2e-6)


def test_theta_and_norm_epsilon_matter():
    """So that the tests above would notice a wrong one."""
    tokens = random_tokens(1, 17)
    torch_model, model = pair()
    params = reference.llama_params(torch_model, CONFIG)
    for change in ({"rope_theta": 10000.0}, {"rms_norm_eps": 1e-2}):
        other = decoder(params, dataclasses.replace(CONFIG, **change))
        assert np.abs(our_logits(model, tokens) - our_logits(other, tokens)).max() > 1e-2


def test_ragged_padded_batch_equals_transformers():
    torch_model, model = pair()
    tokens, lengths = random_tokens(3, 12), np.array([12, 5, 9])
    real = np.arange(12)[None] < lengths[:, None]
    ours = our_logits(model, tokens, segment_ids=jnp.asarray(real, jnp.int32))
    expected = torch_logits(torch_model, tokens, attention_mask=real.astype(int))
    np.testing.assert_allclose(ours[real], expected[real], rtol=0, atol=2e-5)


def test_decoder_layer_equals_transformers():
    torch_config = reference.torch_text_config(CONFIG)
    torch_config._attn_implementation = "sdpa"
    torch_layer = reference.randomize(LlamaDecoderLayer(torch_config, layer_idx=0))
    x = np.random.default_rng(0).normal(size=(2, 7, CONFIG.hidden_size)).astype(np.float32)
    positions = np.array([[0, 1, 2, 3, 4, 5, 6], [0, 1, 2, 0, 1, 2, 3]])
    segments = jnp.array([[1] * 7, [1] * 3 + [2] * 4])
    with torch.no_grad():
        expected = torch_layer(
            torch.from_numpy(x),
            attention_mask=torch.tensor(np.asarray(causal_segment_mask(segments)))[:, None],
            position_embeddings=LlamaRotaryEmbedding(torch_config)(torch.from_numpy(x), torch.from_numpy(positions)),
        ).numpy()
    assert expected.std() > 0.5

    entries = [e for e in family_of(CONFIG).entries(dataclasses.replace(CONFIG, num_layers=1)) if e.layers is not None]
    tensors = {f"layers.0.{name}": value.detach().numpy() for name, value in torch_layer.named_parameters()}
    layer = LlamaLayer(CONFIG, rngs=nnx.Rngs(0))
    for entry in entries:
        module, _, name = entry.name.removeprefix("llm.layers.").rpartition(".")
        parameter = getattr(operator.attrgetter(module)(layer), name)
        parameter[...] = jnp.asarray(to_ours(entry, tensors.__getitem__)[0])
    rotation = decoder_without_weights().rotation(jnp.asarray(positions))
    ours = nnx.jit(lambda layer, *args: layer(*args))(layer, jnp.asarray(x), rotation, segments)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-5)


def test_rotation_equals_transformers_at_far_positions():
    rotary = LlamaRotaryEmbedding(reference.torch_text_config(CONFIG))
    positions = np.array([[0, 1, 100, 2047]])
    q = np.random.default_rng(0).normal(size=(1, 4, 6, CONFIG.head_dim)).astype(np.float32)
    torch_q = torch.from_numpy(q).transpose(1, 2)
    cos, sin = rotary(torch_q, torch.from_numpy(positions))
    expected = apply_rotary_pos_emb(torch_q, torch_q, cos, sin)[0].transpose(1, 2).numpy()
    model = decoder_without_weights()
    np.testing.assert_allclose(rotate(jnp.asarray(q), model.rotation(jnp.asarray(positions))), expected, atol=5e-4)


def test_angles_are_exact_to_float32():
    """Against float64: a position in bfloat16 would be off by whole radians, a table in it by 0.4 %."""
    model = decoder_without_weights()
    positions = np.arange(0, 4096, 37)[None]
    exact = positions[..., None] * CONFIG.rope_theta ** -(np.arange(0, CONFIG.head_dim, 2) / CONFIG.head_dim)
    cos, sin = model.rotation(jnp.asarray(positions))
    assert cos.dtype == sin.dtype == jnp.float32
    np.testing.assert_allclose(cos[:, :, 0], np.cos(exact), rtol=0, atol=5e-4)
    np.testing.assert_allclose(sin[:, :, 0], np.sin(exact), rtol=0, atol=5e-4)


def test_packed_samples_see_only_themselves():
    _, model = pair()
    first, second = random_tokens(1, 5), random_tokens(1, 8, seed=1)
    tokens = np.concatenate([first, second, random_tokens(1, 3, seed=2)], axis=1)  # and 3 of padding
    positions = jnp.array([[*range(5), *range(8), *range(3)]])
    segment_ids = jnp.array([[1] * 5 + [2] * 8 + [0] * 3])
    packed = our_logits(model, tokens, positions, segment_ids)
    np.testing.assert_allclose(packed[:, :5], our_logits(model, first), rtol=0, atol=1e-5)
    np.testing.assert_allclose(packed[:, 5:13], our_logits(model, second), rtol=0, atol=1e-5)


def test_padding_changes_nothing_and_stays_finite():
    _, model = pair()
    tokens = random_tokens(1, 6)
    segment_ids = jnp.array([[1] * 6 + [0] * 4])
    logits = [
        our_logits(model, np.concatenate([tokens, padding], axis=1), segment_ids=segment_ids)
        for padding in (np.zeros((1, 4), int), random_tokens(1, 4, seed=3))
    ]
    np.testing.assert_array_equal(logits[0][:, :6], logits[1][:, :6])
    np.testing.assert_allclose(logits[0][:, :6], our_logits(model, tokens), rtol=0, atol=1e-5)
    assert np.isfinite(logits).all()


@nnx.jit
def prefill(model, tokens, positions):
    hidden, cache = model.extend(model.embed_tokens(tokens), positions)
    return model.logits(hidden), cache


@nnx.jit
def decode(model, tokens, positions, cache):
    hidden, cache = model.extend(model.embed_tokens(tokens), positions, cache)
    return model.logits(hidden), cache


@pytest.mark.parametrize(
    ("config", "transposed"),
    [
        (CONFIG, None),
        (dataclasses.replace(CONFIG, sliding_window=5), None),
        (reference.TEXTS["qwen2"], False),
        (reference.TEXTS["qwen2"], True),
        (reference.TEXTS["qwen3"], False),
        (dataclasses.replace(reference.TEXTS["gemma3_text"], sliding_window=5), None),
        (dataclasses.replace(reference.TEXTS["gemma3_text"], sliding_window=5), True),
    ],
    ids=[
        "plain",
        "window",
        "unstacked with biases",
        "transposed with biases",
        "unstacked with norms of heads",
        "windows of some layers",
        "transposed with windows of some layers",
    ],
)
def test_prefill_and_decode_equal_the_full_forward_in_a_ragged_batch(config, transposed):
    _, model = pair(config)
    T, prompts = 14, np.array([9, 4, 1])  # row lengths of the prompts; five tokens are decoded after each
    tokens = random_tokens(3, T)
    expected = our_logits(model, tokens)
    if transposed is not None:
        model.unstack_layers(transposed)

    logits, cache = prefill(model, jnp.asarray(tokens), arange_rows(tokens))
    assert [k.shape for k in cache.k] == CONFIG.num_layers * [(3, CONFIG.num_kv_heads, T, config.head_dim)]
    for row, length in enumerate(prompts):
        np.testing.assert_allclose(logits[row, :length], expected[row, :length], rtol=0, atol=1e-5)

    # What stands in slots not yet reached must not matter.
    unreached = (np.arange(T)[None] >= prompts[:, None])[:, None, :, None]
    cache = jax.tree.map(lambda stored: jnp.asarray(np.where(unreached, 1e6, stored)), cache)
    for step in range(5):
        positions = prompts + step
        next_tokens = jnp.asarray(tokens[np.arange(3), positions][:, None])
        decoded, cache = decode(model, next_tokens, jnp.asarray(positions)[:, None], cache)
        np.testing.assert_allclose(decoded[:, 0], expected[np.arange(3), positions], rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_gradients_equal_transformers(family):
    torch_model, model = pair(dataclasses.replace(reference.TEXTS[family], tie_word_embeddings=True))
    config = model.config
    tokens = random_tokens(2, 11)
    torch_model(input_ids=torch.from_numpy(tokens), labels=torch.from_numpy(tokens)).loss.backward()
    for parameter in torch_model.parameters():
        parameter.data = parameter.grad
    expected = reference.llama_params(torch_model, config)

    @nnx.jit
    @nnx.grad
    def gradient(model):
        logits = forward(model, jnp.asarray(tokens), arange_rows(tokens), jnp.ones((2, 11), int))
        scores = jax.nn.log_softmax(logits[:, :-1])
        return -jnp.take_along_axis(scores, jnp.asarray(tokens)[:, 1:, None], axis=-1).mean()

    gradients = nnx.to_flat_state(gradient(model))
    assert len(gradients) == len(expected)
    for path, value in gradients:
        name = ".".join(("llm", *map(str, path)))
        assert np.abs(expected[name]).max() > 1e-3
        np.testing.assert_allclose(value[...], expected[name], rtol=0, atol=1e-5, err_msg=name)


def test_logits_are_float32_from_bfloat16_states():
    _, model = pair()
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, CONFIG.hidden_size)), jnp.bfloat16)
    logits = nnx.jit(lambda model, hidden: model.logits(hidden))(model, hidden)
    assert logits.dtype == jnp.float32
    kernel = model.lm_head.kernel[...].astype(jnp.bfloat16).astype(jnp.float32)
    np.testing.assert_allclose(logits, hidden.astype(jnp.float32) @ kernel, rtol=0, atol=1e-4)


# Published decoders and how many parameters they have.
PUBLISHED = {
    "llama-7b": (LLAMA_7B, 6_738_415_616),
    "llama-13b": (LLAMA_13B, 13_015_864_320),
    "Llama-3.1-8B": (TextConfig(128256, 4096, 14336, 32, 32, 8, 128), 8_030_261_248),
    "Llama-3.2-1B": (TextConfig(128256, 2048, 8192, 16, 32, 8, 64, tie_word_embeddings=True), 1_235_814_400),
    "Phi-3-mini-4k": (
        TextConfig(32064, 3072, 8192, 32, 32, 32, 96, sliding_window=2047, family="phi3"),
        3_821_079_552,
    ),
    "gemma-3-270m": (
        Gemma3Config(
            262144, 640, 2048, 18, 4, 1, 256, sliding_window=512, tie_word_embeddings=True, family="gemma3_text"
        ),
        268_098_176,
    ),
    "Mistral-7B-v0.1": (TextConfig(32000, 4096, 14336, 32, 32, 8, 128, sliding_window=4096), 7_241_732_096),
    "Qwen2-7B": (TextConfig(152064, 3584, 18944, 28, 28, 4, 128, qkv_bias=True), 7_615_616_512),
    "Qwen3-0.6B": (
        TextConfig(151936, 1024, 3072, 28, 16, 8, 128, tie_word_embeddings=True, family="qwen3"),
        596_049_920,
    ),
    "Qwen3-8B": (TextConfig(151936, 4096, 12288, 36, 32, 8, 128, family="qwen3"), 8_190_735_360),
    "SmolLM2-135M": (TextConfig(49152, 576, 1536, 30, 9, 3, 64, tie_word_embeddings=True), 134_515_008),
    "TinyLlama-1.1B": (TextConfig(32000, 2048, 5632, 22, 32, 4, 64), 1_100_048_384),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_full_size_decoders_have_the_published_parameters(name):
    config, count = PUBLISHED[name]
    state = nnx.state(nnx.eval_shape(lambda: Llama(config, rngs=nnx.Rngs(0))))
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == count
    torch_config = reference.torch_text_config(config)
    assert reference.num_parameters(lambda: transformers.AutoModelForCausalLM.from_config(torch_config)) == count
