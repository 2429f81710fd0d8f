"""The table of parameter names covers both sides exactly and converts without touching a bit."""

import dataclasses

import ml_dtypes
import numpy as np
import pytest
import torch
import torch_reference as reference

from llava_jax.convert.names import entries_of, to_hf, to_hf_tensor, to_ours
from llava_jax.models.hf_names import OIHW_TO_HWIO, SAME, TABLE, TRANSPOSE, Entry
from llava_jax.models.llava import abstract_params

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16, np.float64]


def random_bits(shape, dtype, seed=0):
    """Every bit pattern may occur, NaNs and denormals too."""
    dtype = np.dtype(dtype)
    size = int(np.prod(shape)) * dtype.itemsize
    return np.random.default_rng(seed).integers(0, 256, size, np.uint8).view(dtype).reshape(shape)


def all_entries(config):
    return [entry for entries in entries_of(config).values() for entry in entries]


KINDS = {
    "plain": reference.LLAVA,
    "tied": dataclasses.replace(reference.LLAVA, text=reference.TEXTS["tied"]),
    "qwen2": dataclasses.replace(reference.LLAVA, text=reference.TEXTS["qwen2"]),
    "siglip": dataclasses.replace(reference.LLAVA, vision=reference.SIGLIP),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("projector_type", ["linear", "mlp2x_gelu", "mlp3x_gelu"])
def test_table_names_each_of_our_parameters_once(kind, projector_type):
    config = dataclasses.replace(KINDS[kind], projector_type=projector_type)
    names = [entry.name for entry in all_entries(config)]
    assert len(names) == len(set(names))
    assert set(names) == set(abstract_params(config))


@pytest.mark.parametrize("kind", KINDS)
def test_table_names_each_tensor_of_hugging_face_once_with_its_shape(kind):
    config = KINDS[kind]
    ours = abstract_params(config)
    found = []
    prefixes = ("model.vision_tower.", "model.multi_modal_projector.", "model.language_model.", "")
    for prefix, entries in zip(prefixes, entries_of(config).values(), strict=True):
        found += [
            (prefix + leaf, entry.hf_shape(ours[entry.name].shape)) for entry in entries for leaf in entry.leaves()
        ]
    expected = {name: tuple(p.shape) for name, p in reference.llava(config).named_parameters()}
    assert len(found) == len(expected)
    assert dict(found) == expected


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("entry", all_entries(reference.LLAVA), ids=lambda entry: entry.name)
def test_round_trip_is_bit_equal(entry, dtype):
    shape = entry.hf_shape(abstract_params(reference.LLAVA)[entry.name].shape)
    source = {leaf: random_bits(shape, dtype, seed) for seed, leaf in enumerate(entry.leaves())}
    back = dict(to_hf(entry, to_ours(entry, source.__getitem__)))
    assert list(back) == list(source)
    for leaf, tensor in back.items():
        assert tensor.dtype == source[leaf].dtype
        assert tensor.tobytes() == source[leaf].tobytes()


@pytest.mark.parametrize("transform", [SAME, TABLE, TRANSPOSE, OIHW_TO_HWIO])
@pytest.mark.parametrize("axis", [0, -1])
def test_a_tensor_may_come_in_parts(transform, axis):
    array = random_bits((50, 37, 3, 40)[: len(transform)], np.float16)
    places = [[slice(None)] * array.ndim for _ in range(3)]
    for place, cut in zip(places, (slice(0, 17), slice(17, 33), slice(33, None)), strict=True):
        place[axis] = cut
    entry = Entry("ours", "theirs", transform)
    parts = [(tuple(place), array[tuple(place)]) for place in places]
    found = to_hf_tensor(entry, array.shape, array.dtype, parts)
    assert found.tobytes() == next(to_hf(entry, array))[1].tobytes()
    assert found.flags.c_contiguous


def test_transforms_compute_what_torch_does():
    kernel, x = torch.randn(5, 3, 2, 2), torch.randn(1, 3, 2, 2)
    ours = to_ours(Entry("k", "k", OIHW_TO_HWIO), lambda _: kernel.numpy())
    patch = x[0].permute(1, 2, 0).numpy()  # [height, width, channels]
    expected = torch.nn.functional.conv2d(x, kernel).numpy()[0, :, 0, 0]
    np.testing.assert_allclose(np.einsum("hwi,hwio->o", patch, ours), expected, rtol=1e-5, atol=1e-5)

    weight, y = torch.randn(5, 3), torch.randn(3)
    ours = to_ours(Entry("w", "w", TRANSPOSE), lambda _: weight.numpy())
    np.testing.assert_allclose(y.numpy() @ ours, torch.nn.functional.linear(y, weight).numpy(), rtol=1e-5, atol=1e-5)


def test_a_stack_of_another_length_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        list(to_hf(Entry("w", "layers.{layer}.w", layers=3), np.zeros((2, 4))))
