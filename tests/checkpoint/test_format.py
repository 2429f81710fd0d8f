"""What a checkpoint says about itself: read as it was written, damaged descriptions refused."""

import functools
import json

import pytest
import tiny
from checkpoint_steps import trained

from llava_jax.checkpoint.format import Description
from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError

HOSTILE = {
    "model.text.num_layers": (10**9, "num_layers is 1000000000, not an integer from 1 to 1000"),
    "model.text.hidden_size": (True, "hidden_size is True, not an integer"),
    "model.text.num_heads": (0, "num_heads is 0, not an integer"),
    "model.text.num_kv_heads": (3, "num_heads 4 is not a multiple of num_kv_heads 3"),
    "model.text.head_dim": (9, "head_dim 9 is not a multiple"),
    "model.text.rms_norm_eps": (-1e-6, "rms_norm_eps is -1e-06, not a number from"),
    "model.text.rope_theta": ("1e4", "rope_theta is '1e4', not a number"),
    "model.text.tie_word_embeddings": ("false", "tie_word_embeddings is 'false', not a bool"),
    "model.text.rope_scaling": ({"kind": "linear", "factor": 1e300}, "factor is 1e[+]300, not a number"),
    "model.vision.patch_size": (10**5, "patch_size is 100000, not an integer"),
    "model.vision.hidden_act": ("swish", "hidden_act is 'swish'; supported are"),
    "model.vision.layer_norm_eps": (float("nan"), "layer_norm_eps is nan, not a number"),
    "model.vision": ([], "damaged description"),
    "model": ("llava", "damaged description"),
    "model.image_mean": ([0.5, "0.5", 0.5], "image_mean is .*, not three numbers"),
    "model.image_std": ([0.5, 0.0, 0.5], "image_std is .*, of which none may be 0"),
    "model.projector_type": ("mlp999999999x_gelu", "projector_type is 'mlp999999999x_gelu', not"),
    "model.select_layer": (-999, "select_layer -999 is not among"),
    "hf": ([], "llava.json: hf is .*; only one dict"),
    "hf.config": ("a", "llava.json: hf: config is 'a'; only one dict"),
    "hf.generation_config": ({"eos_token_id": ["</s>"]}, "eos_token_id is .*, not an id or a list of ids"),
    "origins": ({"llm": 5}, "damaged description"),
    "sources": ([{"path": "/", "relative": "..", "id": "../../etc", "names": []}], "id is not made of 1 to 64 letters"),
    "sources.": ([{"path": 5, "relative": "..", "id": "a", "names": []}], "sources are not all texts"),
    "template": (3, "not all texts"),
}  # fmt: skip


@pytest.mark.parametrize("key", HOSTILE)
def test_a_hostile_description_is_one_line(key, model_dir):
    value, message = HOSTILE[key]
    description = json.loads((model_dir / "llava.json").read_text())
    *outer, last = key.rstrip(".").split(".")
    inner = functools.reduce(lambda at, name: at.setdefault(name, {}), outer, description)
    inner[last] = value
    (model_dir / "llava.json").write_text(json.dumps(description))
    with pytest.raises(UserError, match=message) as raised:
        open_checkpoint(model_dir)
    assert "llava.json" in str(raised.value) and "\n" not in str(raised.value)


def test_where_images_stand_is_stored_and_before_the_text_where_it_is_not(tmp_path):
    model_dir = tiny.checkpoint(tmp_path, tiny.config(image_position="as_is"))
    assert open_checkpoint(model_dir).config.image_position == "as_is"
    description = json.loads((model_dir / "llava.json").read_text())
    (model_dir / "llava.json").write_text(
        json.dumps(description | {"model": description["model"] | {"image_position": 1}})
    )
    with pytest.raises(UserError, match="image_position is 1, not"):
        open_checkpoint(model_dir)
    del description["model"]["image_position"]  # as checkpoints of earlier versions
    (model_dir / "llava.json").write_text(json.dumps(description))
    assert open_checkpoint(model_dir).config.image_position == "first"


def test_steps_of_earlier_versions_say_by_their_configuration_where_images_stood(tmp_path, model_dir, monkeypatch):
    def without_position(self):
        values = to_json(self)
        del values["model"]["image_position"]
        return values

    to_json = Description.to_json
    monkeypatch.setattr(Description, "to_json", without_position)
    checkpoints, workdir, *_ = trained(tmp_path, model_dir, steps=(2,))
    checkpoints.close()
    assert open_checkpoint(workdir).config.image_position == "first"
    (workdir / "config.json").write_text(json.dumps({"image_position": "as_is"}))
    for path in (workdir, workdir / "checkpoints" / "2"):
        assert open_checkpoint(path).config.image_position == "as_is"
    (workdir / "config.json").write_text('{"image_pos')
    with pytest.raises(UserError, match="config.json: damaged"):
        open_checkpoint(workdir)
