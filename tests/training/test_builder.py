"""One program: what training compiles on a first start and on a resume is what preflight compiles."""

import jax
import pytest
import tiny
from training_runs import run_config, stop_at

from llava_jax.cli import UserError
from llava_jax.models.families.gemma3_text import Gemma3Config
from llava_jax.preflight import compile, targets
from llava_jax.training import builder, loop


@pytest.mark.parametrize("stage", ["pretrain", "finetune"])
def test_training_its_resume_and_preflight_compile_the_same_program(stage, world, tmp_path, monkeypatch):
    """The text has shapes, types, shardings, donated arguments and constants. Slots are given, as data would decide."""
    config = run_config(world, stage, steps=3, rows_per_group=2, max_rows_per_device=2, image_slots=4, label_slots=100)
    lowered, lower = [], builder.TrainingProgram.lower

    def record(program):
        lowered.append(lower(program))
        return lowered[-1]

    monkeypatch.setattr(builder.TrainingProgram, "lower", record)
    stop_at(2, config, tmp_path / "run")
    loop.train(config, str(tmp_path / "run"))
    compile.build(config, targets.parse("cpu")).training.lower()
    first, resumed, preflight = (step.as_text() for step in lowered)
    assert first == resumed == preflight
    assert lowered[0].in_avals == lowered[1].in_avals == lowered[2].in_avals
    assert "tf.aliasing_output" in first and "tensor<4x64xi32>" in first


def test_a_program_describes_the_arrays_that_training_makes():
    """Parameters in their types, optimizer state and batches, wherever they lie."""
    model, mesh = tiny.config(), builder.sharding.make_mesh({"fsdp": -1})
    config = run_config({"init": "", "json": "", "images": ""}, frozen_dtype="bfloat16")
    layout = compile.worst_layout(config, model)
    program = builder.build(config, model, layout, mesh, steps=6)
    assert {leaf.dtype.name for leaf in program.frozen.values()} == {"bfloat16"}
    assert {name.split(".")[0] for name in program.state.trainable} == {"projector", "llm"}
    assert {name.split(".")[0] for name in program.frozen} == {"vision"}
    params = tiny.params(model)
    trainable = {name: jax.numpy.array(params[name]) for name in program.state.trainable}
    state = builder.init_state(program.optimizer, trainable, mesh)
    described = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding, leaf.weak_type), program.state)
    made = jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype, leaf.sharding, leaf.weak_type), state)
    assert described.step == made.step and described.optimizer == made.optimizer
    assert {leaf.sharding for leaf in program.batch.values()} == {builder.sharding.batch_sharding(mesh)}


def test_layers_that_see_different_windows_train_on_one_device_alone():
    text = Gemma3Config(tiny.VOCAB, 48, 96, 2, 4, 2, 12, sliding_window=4, family="gemma3_text")
    config, model = run_config({"init": "", "json": "", "images": ""}), tiny.config(text=text)
    layout = compile.worst_layout(config, model)
    mesh = jax.sharding.AbstractMesh((1, 2, 1), builder.sharding.AXES)
    with pytest.raises(UserError, match="gemma3_text trains on one device only"):
        builder.build(config, model, layout, mesh, steps=6)
