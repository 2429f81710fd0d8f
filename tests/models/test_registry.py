"""What is registered, and that everything that lists towers, families and projectors lists what is registered."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch_reference as reference

from llava_jax.models import families, projectors, towers
from llava_jax.models.config import TextConfig, VisionConfig
from llava_jax.models.families import family_of
from llava_jax.models.projectors.mlp import MlpKind
from llava_jax.models.registry import FAMILIES, PROJECTORS, TOWERS, registers
from llava_jax.parallel import sharding
from llava_jax.registry import Registry


def table(heading: str) -> list[list[str]]:
    """The cells of the table of docs/models.md whose first column has this heading."""
    text = Path("docs/models.md").read_text()
    lines = re.search(rf"^\| {heading} .*\n\|[-|]+\n((?:\|.*\n)+)", text, re.MULTILINE)[1].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def test_the_documentation_lists_each_tower():
    listed = [tuple(re.findall(r"`(\w+)`", row[1])) for row in table("vision tower")]
    assert listed == [(tower.model_type, tower.whole_model_type) for tower in TOWERS.values()]


def test_the_documentation_lists_each_family():
    listed = [re.fullmatch(r"`(\w+)`", row[1])[1] for row in table("language model")]
    assert list(dict.fromkeys(listed)) == list(FAMILIES)


@pytest.mark.parametrize("text", reference.TEXTS)
def test_the_three_oldest_families_are_told_by_their_fields(text):
    config = reference.TEXTS[text]
    assert family_of(config).name == (text if text in FAMILIES else "llama")
    assert config.family is None or text not in ("llama", "mistral", "qwen2")
    assert "family" not in reference.LLAVA.to_dict()["text"]  # which earlier versions would not know


def test_of_families_that_compute_the_same_the_source_decides():
    assert family_of(reference.TEXT, "mistral").name == "mistral"
    assert family_of(reference.TEXT, "qwen2").name == "llama"  # which has biases


def test_what_is_not_registered_is_refused_by_name():
    with pytest.raises(ValueError, match="kind resnet: is no such vision tower; choose from clip, siglip; a module"):
        VisionConfig(32, 64, 3, 4, image_size=16, patch_size=8, kind="resnet")
    with pytest.raises(
        ValueError,
        match="family gpt2: is no such decoder family; choose from llama, mistral, qwen2, qwen3, phi3, gemma3_text;",
    ):
        TextConfig(9, 8, 8, 1, 1, 1, 8, family="gpt2")


@pytest.mark.parametrize(
    "register, base, fields",
    [
        (towers.register, towers.Tower, {"name": "clip"}),
        (families.register, families.Family, {"name": "llama"}),
        (projectors.register, MlpKind, {}),
    ],
)
def test_a_name_is_registered_once(register, base, fields):
    with pytest.raises(ValueError, match="is registered already"):
        register(type("Another", (base,), fields))


def test_what_lacks_a_method_is_not_registered():
    with pytest.raises(TypeError, match="abstract methods build, entries"):
        projectors.register(type("Half", (projectors.ProjectorKind,), {"pattern": "half"}))
    assert "half" not in PROJECTORS


def test_what_is_registered_says_how_its_parameters_are_sharded(monkeypatch):
    monkeypatch.setattr(sharding, "PARAMETER_AXES", list(sharding.PARAMETER_AXES))
    assert sharding.fsdp_axis("vision.layers.relation.kernel", 3) is None
    axes = ((r"\brelation\.kernel$", (None, "embed")),)
    registers(Registry("tower"))(type("Another", (towers.Tower,), {"name": "other", "parameter_axes": axes}))
    assert sharding.fsdp_axis("vision.layers.relation.kernel", 3) == 2


def test_configurations_do_not_import_jax():
    code = "import sys, llava_jax.models.config; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
