"""Adapters are added to the weights when a checkpoint is read as a plain model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
import torch
from bitsandbytes import functional
from forward import logits, make_batch, random_images
from PIL import Image

from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.merged import merged
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert import verify
from llava_jax.convert.__main__ import main
from llava_jax.convert.found import Options
from llava_jax.convert.import_hf import find_llava
from llava_jax.convert.tensors import open_files
from llava_jax.inference.generate import Generator, load_model
from llava_jax.inference.requests import Request, Sampling
from llava_jax.models.config import LoraConfig

PLAIN = tiny.config()
LORA = LoraConfig(4, 6.0, ("q_proj", "up_proj", r"vision\..*fc1", r"projector\.linear_2"))
KINDS = {
    "lora": LORA,
    "rslora": dataclasses.replace(LORA, rslora=True, dropout=0.5),
    "dora": dataclasses.replace(LORA, dora=True),
}


@pytest.fixture(scope="module", params=KINDS)
def adapted(request, tmp_path_factory):
    model = dataclasses.replace(PLAIN, lora=KINDS[request.param])
    return tiny.checkpoint(tmp_path_factory.mktemp(request.param), model)


def computed(config, params):
    size = config.vision.image_size
    batch = make_batch([[5, "image", 60, "image", 3], [9]], random_images(2, 2, size=size), config=config)
    return np.asarray(logits(config, params, batch))[batch["segment_ids"] > 0]


def check_equal(directory, adapted):
    """A plain checkpoint computes what the adapted one does."""
    checkpoint, source = open_checkpoint(directory), open_checkpoint(adapted)
    assert checkpoint.config == dataclasses.replace(source.config, lora=None)
    expected = computed(source.config, source.load())
    np.testing.assert_allclose(computed(PLAIN, checkpoint.load()), expected, rtol=0, atol=1e-5)
    return checkpoint


def test_a_loaded_model_computes_the_same(adapted):
    source = open_checkpoint(adapted)
    expected = computed(source.config, source.load())
    base = computed(PLAIN, {name: value for name, value in source.load().items() if ".lora." not in name})
    assert np.abs(expected - base).max() > 0.1
    plain = merged(source)
    np.testing.assert_allclose(computed(plain.config, plain.load()), expected, rtol=0, atol=1e-5)
    for name, value in plain.load().items():
        np.testing.assert_allclose(plain.read(name), value, rtol=0, atol=1e-6, err_msg=name)
    assert merged(plain) is plain


def test_over_devices_and_in_other_types(adapted):
    """Each kernel is rounded once, to the requested type."""
    plain = merged(open_checkpoint(adapted))
    exact = plain.load()
    mesh = jax.make_mesh((1,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = "llm.layers.attention.q_proj.kernel"
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    loaded = plain.load([kernel], lambda name, stored: jnp.bfloat16, lambda name: sharding)[kernel]
    assert (loaded.sharding, loaded.dtype) == (sharding, jnp.bfloat16)
    np.testing.assert_array_equal(loaded, exact[kernel].astype(jnp.bfloat16))


def test_answers_are_those_of_the_merged_checkpoint_also_in_int8(adapted, tmp_path, capsys):
    main(["merge", "--checkpoint", str(adapted), "--output", str(tmp_path / "out")])
    assert "adapters merged; rounding changed what they add by 0.00%" in capsys.readouterr().out
    check_equal(tmp_path / "out", adapted)
    request = Request([("user", "<image>\nWhat colour is it?")], [Image.new("RGB", (20, 24), (220, 30, 30))])
    for quantize in (None, "int8"):
        answers = [
            Generator.from_checkpoint(open_checkpoint(path), quantize=quantize).answer([request], Sampling(8))
            for path in (adapted, tmp_path / "out")
        ]
        assert answers[0] == answers[1]
    with pytest.raises(UserError, match="out: has no adapters to merge; to copy it: python -m llava_jax.convert copy"):
        main(["merge", "--checkpoint", str(tmp_path / "out"), "--output", str(tmp_path / "again")])


def test_a_copy_keeps_the_adapters(adapted, tmp_path):
    main(["copy", "--checkpoint", str(adapted), "--output", str(tmp_path / "out")])
    copied, source = open_checkpoint(tmp_path / "out"), open_checkpoint(adapted)
    assert copied.config == source.config
    for name, value in source.load().items():
        np.testing.assert_array_equal(copied.read(name), value, err_msg=name)


def test_half_precision_weights_are_rounded_once_and_the_loss_is_reported(adapted, tmp_path, capsys):
    source = open_checkpoint(adapted)
    params = {name: value.astype(jnp.bfloat16 if ".kernel" in name else None) for name, value in source.load().items()}
    tiny.save_model(tmp_path / "half", params, source.description, source.tokenizer_dir)
    main(["merge", "--checkpoint", str(tmp_path / "half"), "--output", str(tmp_path / "out")])
    reported = float(capsys.readouterr().out.split("by ")[1].split("%")[0]) / 100
    assert 1e-4 < reported < 0.05
    result, half = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "half")
    exact = merged(half).load(dtype=lambda name, stored: jnp.float32)
    for name, value in exact.items():
        stored = result.read(name)
        assert stored.dtype == half.read(name).dtype
        distance = np.abs(stored.astype(np.float32) - value)
        assert (distance <= 0.5 * np.float32(2**-7) * np.abs(value) + 1e-6).all(), name
    model = load_model(half, jnp.float32)
    assert model.config.lora is None


@pytest.mark.parametrize("base_dtype", ["int8", "nf4"])
def test_a_quantized_base_is_dequantized_and_the_sum_rounded_once(base_dtype, tmp_path, capsys):
    """W + s B A of PEFT, in the type of the embeddings; W of NF4 is that of bitsandbytes, of int8 codes by scales."""
    text = dataclasses.replace(PLAIN.text, hidden_size=64, intermediate_size=128)
    plain = dataclasses.replace(PLAIN, text=text, lora=LoraConfig(4, 6.0, ("q_proj", "up_proj", "down_proj")))
    model = dataclasses.replace(plain, base_dtype=base_dtype)
    params = {
        name: value if ".lora." in name else value.astype(jnp.bfloat16) for name, value in tiny.params(plain).items()
    }
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    quantized = tiny.quantized_params(params, model)
    tiny.save_model(tmp_path / "adapted", quantized, Description(model, "v1"), tmp_path / "tokenizer")
    main(["merge", "--checkpoint", str(tmp_path / "adapted"), "--output", str(tmp_path / "out")])
    assert "adapters merged; rounding changed what they add by" in capsys.readouterr().out
    result, source = open_checkpoint(tmp_path / "out"), open_checkpoint(tmp_path / "adapted")
    assert result.config == dataclasses.replace(plain, lora=None)
    stored = result.load()
    exact = merged(source).load(dtype=lambda name, stored: jnp.float32)
    rounding = np.float32(2.0**-8)  # half of the last bit of bfloat16
    for layer in ("q_proj", "up_proj", "down_proj"):
        name = f"llm.layers.{'attention' if layer == 'q_proj' else 'mlp'}.{layer}"
        a, b = (np.asarray(params[f"{name}.lora.{part}"]) for part in "ab")
        kernels = np.asarray(params[f"{name}.kernel"], np.float32)
        if base_dtype == "int8":
            base = np.float32(quantized[f"{name}.codes"]) * np.asarray(quantized[f"{name}.scales"])[:, None]
            assert np.abs(base - kernels).max() <= np.abs(kernels).max() / 127 / 2 + 1e-6
        else:
            base = np.stack(list(map(by_bitsandbytes, kernels)))
        expected = base + 1.5 * a @ b
        np.testing.assert_allclose(exact[f"{name}.kernel"], expected, rtol=0, atol=1e-6)
        assert stored[f"{name}.kernel"].dtype == jnp.bfloat16
        off = np.abs(np.asarray(stored[f"{name}.kernel"], np.float32) - expected)
        assert (off <= rounding * np.abs(expected) + 1e-6).all()
        np.testing.assert_array_equal(merged(source).load([f"{name}.kernel"])[f"{name}.kernel"],
                                      np.asarray(exact[f"{name}.kernel"]).astype(jnp.bfloat16))  # fmt: skip
    unmerged = computed(model, source.load())
    np.testing.assert_allclose(computed(result.config, exact), unmerged, rtol=0, atol=1e-5)
    np.testing.assert_allclose(computed(result.config, stored), unmerged, rtol=0, atol=0.02)


def by_bitsandbytes(kernel_IO: np.ndarray) -> np.ndarray:
    """float32[I, O], quantized to NF4 and back."""
    weight = torch.from_numpy(np.ascontiguousarray(kernel_IO.T))
    codes, state = functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
    return functional.dequantize_4bit(codes, state).numpy().T


def test_exports_are_merged(adapted, tmp_path):
    main(["export", "--checkpoint", str(adapted), "--output", str(tmp_path / "hf")])
    main(["import", "--llava", str(tmp_path / "hf"), "--output", str(tmp_path / "back")])
    imported, source = open_checkpoint(tmp_path / "back"), open_checkpoint(adapted)
    expected = computed(source.config, source.load())
    found = computed(imported.config, imported.load())[:, : expected.shape[1]]  # an export has a row for <image>
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5)
    for finding in (
        verify.compare_config(merged(source), find_llava(tmp_path / "hf", Options())),
        verify.compare_tensors(merged(source), find_llava(tmp_path / "hf", Options())),
    ):
        assert finding.equal, finding
    main(
        [
            "export",
            "--checkpoint",
            str(adapted),
            "--layout",
            "projector",
            "--tower",
            "x",
            "--output",
            str(tmp_path / "p"),
        ]
    )
    (projector,) = {
        tensor.shape for name, tensor in open_files([tmp_path / "p/mm_projector.bin"]).items() if ".2.w" in name
    }
    assert projector == (48, 48)
