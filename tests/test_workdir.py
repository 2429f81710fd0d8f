"""Whose a workdir is."""

import json

import pytest
from etils import epath

from configs import finetune
from llava_jax import workdir
from llava_jax.cli import UserError


def test_a_workdir_of_a_recipe_that_named_its_model_still_resumes(tmp_path):
    """Recipes without a size named a model of 7B once, and there was no default_model."""
    data = {"samples": 1, "sha256": "0"}
    (tmp_path / "data.json").write_text(json.dumps(data))
    then = finetune.get_config("7b").to_dict()
    del then["default_model"]
    (tmp_path / "config.json").write_text(json.dumps(then))
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    workdir.claim(epath.Path(tmp_path), finetune.get_config(), data)
    with pytest.raises(UserError, match="belongs to a run of another configuration .*batch_rows: 128 there, 32 now"):
        workdir.claim(epath.Path(tmp_path), finetune.get_config("v0"), data)
