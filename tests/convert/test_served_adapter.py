"""Adapters for an engine: read from directories of PEFT and of runs, and refused where they are for another base."""

import dataclasses
import shutil

import adapters as support
import jax
import jax.numpy as jnp
import numpy as np
import peft_adapters
import pytest
import tiny
import torch
import torch_reference as reference

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert.served_adapter import read_for
from llava_jax.models import batched_lora
from llava_jax.models.config import LlavaConfig
from llava_jax.models.llava import abstract_params, build

LORA = support.lora(3)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("base"))


@pytest.mark.parametrize("use_dora", [False, True])
def test_a_row_of_a_batch_has_the_logits_of_peft(tmp_path, base, use_dora):
    config = open_checkpoint(base).config
    torch_model = peft_adapters.adapted(config, use_dora=use_dora, use_rslora=True)
    read = read_for(str(peft_adapters.save(torch_model, tmp_path / "adapter")), open_checkpoint(base))
    assert read.prompts is None and read.lora.dora == use_dora

    tokens = np.random.default_rng(0).integers(4, tiny.VOCAB - 1, (2, 200))
    model = build(config, jax.tree.map(jnp.asarray, reference.llava_params(reference.llava(config), config)))
    batched_lora.attach(model, 2, 6)
    model.unstack_layers()
    batched_lora.write(model, 2, read.lora, read.params)
    batched_lora.use(model, jnp.array([2, 0]))
    hidden, _ = model.llm.extend(model.embed(tokens), jnp.broadcast_to(jnp.arange(200), tokens.shape))
    found = np.asarray(model.llm.logits(hidden))
    with torch.no_grad():
        expected = torch_model(input_ids=torch.from_numpy(tokens)).logits.numpy()
        with torch_model.disable_adapter():
            without = torch_model(input_ids=torch.from_numpy(tokens)).logits.numpy()
    np.testing.assert_allclose(found[0], expected[0], atol=1e-4, rtol=0)
    np.testing.assert_allclose(found[1], without[1], atol=1e-4, rtol=0)
    assert abs(expected - without).max() > 0.1


def test_an_adapter_of_peft_goes_with_a_quantized_base(tmp_path, base):
    saved = str(peft_adapters.save(peft_adapters.adapted(open_checkpoint(base).config), tmp_path / "adapter"))
    plain, quantized = (read_for(saved, open_checkpoint(base).quantized(kind)) for kind in ("", "nf4"))
    assert plain.lora == quantized.lora
    for name, value in plain.params.items():
        np.testing.assert_array_equal(quantized.params[name], value, err_msg=name)


def test_a_workdir_has_its_own_template_and_projector(tmp_path, base):
    trained = support.adapter(open_checkpoint(base).config, LORA, projector=True)
    workdir = support.workdir(tmp_path / "run", base, LORA, trained, template="plain")
    for directory in (workdir, workdir / "checkpoints/3"):
        read = read_for(str(directory), open_checkpoint(base))
        assert (read.lora, read.prompts.template.name, read.origin) == (LORA, "plain", str(directory))
        assert read.params.keys() == trained.keys()
        for name, value in trained.items():
            np.testing.assert_array_equal(read.params[name], value)
    assert read_for(str(workdir), open_checkpoint(base), template="v1").prompts.template.name == "v1"


def test_the_base_of_an_adapter_may_be_a_step_of_a_run(tmp_path, base):
    full = {name: value for name, value in tiny.params(open_checkpoint(base).config, 5).items() if "llm.layers" in name}
    steps = [support.workdir(tmp_path / f"full{step}", base, None, full, step=step) for step in (3, 4)]
    trained = support.adapter(open_checkpoint(base).config, LORA)
    workdir = support.workdir(tmp_path / "run", steps[0], LORA, trained)
    assert read_for(str(workdir), open_checkpoint(steps[0])).params.keys() == trained.keys()
    later = steps[0] / "checkpoints/4"  # of the same run
    shutil.copytree(steps[0] / "checkpoints/3", later)
    for other in (base, steps[1], steps[0]):
        with pytest.raises(UserError, match="run: was trained on .*full3/checkpoints/3, which is not the checkpoint"):
            read_for(str(workdir), open_checkpoint(other))
    assert read_for(str(workdir), open_checkpoint(steps[0] / "checkpoints/3")).lora == LORA


def test_the_sources_that_an_adapter_names_are_not_opened(tmp_path, base):
    trained = support.adapter(open_checkpoint(base).config, LORA)
    moved = tmp_path / "base"
    shutil.copytree(base, moved)
    workdir = support.workdir(tmp_path / "run", moved, LORA, trained)
    shutil.rmtree(moved)
    assert read_for(str(workdir), open_checkpoint(base)).params.keys() == trained.keys()


def with_config(tmp_path, name: str, **changes):
    """A checkpoint of zeros with other fields of the model, or of its text."""
    config = tiny.config()
    text = {key: changes.pop(key) for key in list(changes) if hasattr(config.text, key)}
    config = dataclasses.replace(config, text=dataclasses.replace(config.text, **text), **changes)
    return tiny.checkpoint(tmp_path / name, config, params=zeros(config))


def zeros(config: LlavaConfig) -> dict[str, np.ndarray]:
    """Parameters that take no time to make, for what is refused."""
    return {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in abstract_params(config).items()}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vocab_size": 401}, "for another base: its text.vocab_size is 401, and that of the checkpoint 400"),
        ({"num_layers": 3}, "for another base: its text.num_layers is 3, and that of the checkpoint 2"),
        ({"family": "qwen2"}, "for another base: its text.family is qwen2, and that of the checkpoint None"),
        ({"projector_type": "linear"}, "for another base: its projector_type is linear"),
        ({"image_position": "random"}, "was trained on .*other/model, which is not the checkpoint: give that one"),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path, base, changes, message):
    (tmp_path / "other").mkdir()
    other = with_config(tmp_path, "other", **changes)
    adapted = zeros(dataclasses.replace(open_checkpoint(other).config, lora=LORA))
    trained = {name: value for name, value in adapted.items() if ".lora." in name}
    workdir = support.workdir(tmp_path / "run", other, LORA, trained)
    with pytest.raises(UserError, match=message):
        read_for(str(workdir), open_checkpoint(base))


def test_an_adapter_of_rounded_weights_is_served_with_a_warning(tmp_path, base, capsys):
    trained = support.adapter(open_checkpoint(base).config, LORA)
    workdir = support.workdir(tmp_path / "run", base, LORA, trained, base_dtype="nf4")
    assert read_for(str(workdir), open_checkpoint(base)).lora == LORA
    assert capsys.readouterr().err.endswith("run: was trained on weights in nf4, and the checkpoint's are not rounded "
                                            "to it\n")  # fmt: skip


def test_what_only_a_merged_model_can_have_is_refused(tmp_path, base):
    config = open_checkpoint(base).config
    for lora, more, name in (
        (LORA, "llm.norm.scale", "llm.norm.scale"),
        (support.lora(2, (r"vision\..*fc1",)), "", "vision.layers.mlp.fc1.lora"),
    ):
        trained = support.adapter(config, lora)
        if more:
            trained[more] = np.asarray(tiny.params(config)[more])
        workdir = support.workdir(tmp_path / name, base, lora, trained)
        with pytest.raises(UserError, match=rf"also changes {name}.*merge it instead"):
            read_for(str(workdir), open_checkpoint(base))
        with pytest.raises(UserError, match="the checkpoint has an adapter already"):
            read_for(str(workdir), open_checkpoint(workdir))


def test_what_is_no_adapter_is_refused(tmp_path, base):
    for directory, message in ((base, "a checkpoint without an adapter"), (tmp_path, "neither the output of")):
        with pytest.raises(UserError, match=message):
            read_for(str(directory), open_checkpoint(base))
    lora = support.lora(3)
    trained = support.adapter(open_checkpoint(base).config, lora)
    trained["llm.layers.mlp.up_proj.lora.a"] = trained["llm.layers.mlp.up_proj.lora.a"][:, :, :2]
    workdir = support.workdir(tmp_path / "run", base, lora, trained)
    with pytest.raises(UserError, match="does not hold this adapter: llm.layers.mlp.up_proj.lora.a is"):
        read_for(str(workdir), open_checkpoint(base))
