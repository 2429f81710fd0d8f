"""`convert verify`: what was exported is found equal, and what was changed since is named."""

import json

import numpy as np
import pytest
import tiny
from conversion import edit_json
from safetensors.numpy import load_file, save_file

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert import verify
from llava_jax.convert.__main__ import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return tiny.checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(params=[None, "float16"])
def exported(request, checkpoint, tmp_path):
    flags = ["--dtype", request.param] if request.param else []
    main(["export", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "hf"), *flags])
    return tmp_path / "hf"


def verified(checkpoint, directory) -> dict[str, verify.Finding]:
    return {finding.what: finding for finding in verify.verify(str(checkpoint), str(directory))}


def test_an_export_is_equal(checkpoint, exported, capsys):
    assert main(["verify", "--checkpoint", str(checkpoint), "--hf", str(exported)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[:2] for line in lines] == [
        [what, "equal"] for what in ("config", "tensors", "loading", "logits", "processor", "answers")
    ]


def test_a_changed_tensor_is_named(checkpoint, exported, capsys):
    file = exported / "model.safetensors"
    tensors = {name: np.array(value) for name, value in load_file(file).items()}
    tensors["language_model.model.layers.1.mlp.up_proj.weight"][3, 5] += 0.5
    save_file(tensors, file, metadata={"format": "pt"})
    assert main(["verify", "--checkpoint", str(checkpoint), "--hf", str(exported)]) == 1
    told = capsys.readouterr().out
    assert "tensors    DIFFER  1 of" in told and "layers.1.mlp.up_proj.weight by 0.5" in told
    assert "logits     DIFFER" in told


def test_a_changed_setting_is_named(checkpoint, exported):
    file = exported / "config.json"
    config = json.loads(file.read_text())
    config["vision_feature_layer"] = -1
    config["text_config"]["rms_norm_eps"] = 0.1
    file.write_text(json.dumps(config))
    edit_json(exported / "preprocessor_config.json", do_pad=False)
    found = verified(checkpoint, exported)["config"]
    assert not found.equal and "image_aspect is pad, there square" in found.detail
    assert "select_layer is -2, there -1" in found.detail and "text.rms_norm_eps is 1e-05, there 0.1" in found.detail


def test_a_changed_processor_is_noted(checkpoint, exported):
    file = exported / "chat_template.jinja"
    file.write_text(file.read_text().replace("USER", "HUMAN"))
    found = verified(checkpoint, exported)
    assert found["processor"].equal is None and "input_ids" in found["processor"].detail
    assert found["answers"].equal


def test_without_torch_or_memory_the_rest_is_compared(checkpoint, exported, monkeypatch):
    monkeypatch.setattr(verify.os, "sysconf", lambda name: 1)
    found = verified(checkpoint, exported)
    assert list(found) == ["config", "tensors", "computed"] and "memory does not hold" in found["computed"].detail
    monkeypatch.setattr(verify.importlib.util, "find_spec", lambda name: None)
    assert "torch is not installed" in verified(checkpoint, exported)["computed"].detail


def test_with_little_memory_the_first_layers_are_compared(checkpoint, exported, monkeypatch):
    sizes = {name: leaf.size for name, leaf in open_checkpoint(checkpoint).abstract().items()}
    of_layers = sum(size for name, size in sizes.items() if name.startswith("llm.layers."))
    free = 10 * int(sum(sizes.values()) - 0.3 * of_layers)  # of the two, one fits
    monkeypatch.setattr(verify.os, "sysconf", {"SC_AVPHYS_PAGES": free, "SC_PAGE_SIZE": 1}.get)
    found = verified(checkpoint, exported)
    assert "the first 1 layers" in found.pop("computed").detail
    assert list(found) == ["config", "tensors", "loading", "logits", "processor", "answers"]
    assert all(finding.equal for finding in found.values())


def test_a_directory_that_is_no_llava_is_refused(checkpoint, tmp_path):
    with pytest.raises(UserError, match="no such file"):
        list(verify.verify(str(checkpoint), str(tmp_path)))
