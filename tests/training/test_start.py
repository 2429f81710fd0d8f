"""What a run starts from."""

import dataclasses

import tiny
from etils import epath
from training_runs import make_config

from llava_jax.training.start import find_start


def test_samples_longer_than_the_language_model_knows_are_told(tmp_path, capsys):
    model = tiny.config()
    model = dataclasses.replace(model, text=dataclasses.replace(model.text, max_position_embeddings=64))
    init = tiny.checkpoint(tmp_path, model)
    for length, told in ((64, False), (65, True)):
        find_start(make_config(init=str(init), max_length=length), epath.Path(tmp_path / "run"), None)
        assert ("config.max_length is 65, and the language model knows 64" in capsys.readouterr().err) == told
