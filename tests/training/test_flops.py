"""The formula against what XLA compiles, and against published counts."""

import dataclasses
import math

import jax
import pytest
import tiny

from configs import common
from llava_jax.data.anyres import AnyRes
from llava_jax.data.plan import Layout
from llava_jax.models.config import PRESETS, LoraConfig, VisionConfig
from llava_jax.models.llava import abstract_params
from llava_jax.preflight import compile, targets
from llava_jax.training import flops

MODEL = PRESETS["llava-v1.5-7b"]
ROW = Layout(1, 1, 2048, 1, 2048, MODEL.image_tokens, MODEL.vision.image_size)
PROJECTOR = frozenset(name for name in abstract_params(MODEL) if name.startswith("projector."))
BOTH = frozenset(name for name in abstract_params(MODEL) if name.startswith(("projector.", "llm.")))


SIGLIP = VisionConfig(32, 64, 3, 4, image_size=20, patch_size=8, hidden_act="gelu_pytorch_tanh", kind="siglip")
MODELS = {"pretrain": tiny.config(vision=SIGLIP, select_layer=(-2, 1)), "finetune": tiny.config()}


TABLES = {
    "norms": (r"llm\..*norm",),
    "tower": (r"vision\.",),
    "tower's last products": (r"vision\..*fc2",),
    "second layer of the projector": (r"projector\.linear_2\.kernel",),
    "head": (r"llm\.lm_head",),
    "all": (r"vision\.", r"projector\.", r"llm\."),
    "tower's last layers": ((r"vision\.", {"layers": "-2:"}),),
    "decoder's last layers": ((r"llm\.", {"layers": "2:"}), r"llm\.norm"),
    "middle layers": ((r"llm\.", {"layers": "2:4"}),),
    "norms of some layers": ((r"llm\..*norm", {"layers": "2:"}),),
}
# A scan over a single layer is none to the compiler, which then computes less than the formula says.
DEEP = tiny.config(
    vision=dataclasses.replace(tiny.config().vision, num_layers=5),
    text=dataclasses.replace(tiny.config().text, num_layers=6),
)


@pytest.mark.parametrize(
    "table,remat",
    [(table, remat) for table in TABLES for remat in ("none", "full")]
    # What a layer computes again depends on the policy alone, how many do on the table.
    + [(table, "save_qkv") for table in ("all", "tower", "norms", "decoder's last layers")],
)
def test_formula_and_state_follow_from_the_names_that_are_trained(table, remat, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", DEEP if table.endswith("layers") else tiny.config())
    config = common.get_config()
    config.update(model="tiny", remat=remat, max_length=64, batch_rows=4, image_slots=2, label_slots=48)
    config.trainable = tuple((each, {}) if isinstance(each, str) else each for each in TABLES[table])
    program = compile.build(config, targets.parse("cpu"))
    compiled = compile.compile_program(program)
    assert compiled.cost.flops == pytest.approx(flops.executed_flops(program.training.flops), rel=0.01)
    state = program.training.state
    trained = sum(leaf.size for leaf in state.trainable.values())
    counters = sum(leaf.ndim == 0 for leaf in jax.tree.leaves(state.optimizer))
    assert compiled.memory.optimizer == 2 * 4 * trained + 4 * counters


EVERYWHERE = ("q_proj", "down_proj", r"vision\.layers\..*(v_proj|fc1|fc2)", r"projector\.linear_2")
ADAPTERS = [
    ("none", {}),
    ("full", {}),
    ("save_qkv", {"dropout": 0.1}),
    ("none", {"dora": True}),
    ("full", {"dora": True}),
    ("save_qkv", {"dora": True, "dropout": 0.1}),
    ("none", {"targets": EVERYWHERE, "rslora": True}),
    ("full", {"targets": EVERYWHERE, "dora": True}),
]


def adapted(remat: str, monkeypatch: pytest.MonkeyPatch, base_dtype: str = "", **lora) -> compile.Program:
    """The step of a deep model with adapters of rank 4, in two microbatches."""
    monkeypatch.setitem(PRESETS, "tiny", DEEP)
    config = common.get_config()
    config.update(stage="finetune", model="tiny", remat=remat, max_length=64, batch_rows=8, image_slots=2)
    config.update(label_slots=48, max_rows_per_device=4, base_dtype=base_dtype)
    config.lora.update({"rank": 4} | lora)
    return compile.build(config, targets.parse("cpu"))


@pytest.mark.parametrize("remat,lora", ADAPTERS)
def test_formula_follows_from_the_adapters(remat, lora, monkeypatch):
    program = adapted(remat, monkeypatch, **lora)
    assert program.settings.accumulation == 2
    compiled = compile.compile_program(program)
    parts = program.training.flops
    without = flops.executed_flops(parts, without=["adapters"])
    assert compiled.cost.flops - without == pytest.approx(
        parts["adapters"].needed + parts["adapters"].recomputed, rel=0.01
    )


@pytest.mark.parametrize("stage", MODELS)
@pytest.mark.parametrize("remat,label_slots", [("none", 48), ("full", 1200)])  # 1200 are in chunks
def test_formula_agrees_with_the_compiled_step(stage, remat, label_slots, monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", MODELS[stage])
    config = common.get_config()
    config.update(stage=stage, model="tiny", remat=remat, max_length=640, batch_rows=4, rows_per_group=2)
    config.update(max_rows_per_device=2, label_slots=label_slots, image_slots=3)
    config.mesh.fsdp = jax.device_count()
    program = compile.build(config, targets.parse("cpu"))
    compiled = compile.compile_program(program)
    parts = program.training.flops
    assert compiled.cost.flops * program.mesh.size == pytest.approx(flops.executed_flops(parts), rel=0.01)
    assert compiled.memory.fits and not compiled.reason


# Layers of 7B with gradients of activations, those with gradients of kernels, and those in the state.
@pytest.mark.parametrize(
    ("pattern", "layers", "passed", "kernels", "rows"),
    [
        (r"vision\.", "12:", {"vision": 11, "llm": 32}, {"vision": 11, "llm": 0}, 11),
        (r"llm\.layers", "8:", {"vision": 0, "llm": 24}, {"vision": 0, "llm": 24}, 24),
        (r"llm\.layers.*norm", "30:", {"vision": 0, "llm": 2}, {"vision": 0, "llm": 0}, 2),
        (r"llm\..*norm", "", {"vision": 0, "llm": 32}, {"vision": 0, "llm": 0}, 32),
    ],
    ids=["tower from a layer on", "first layers frozen", "norms of the last layers", "norms"],
)
def test_what_is_frozen_costs_nothing(pattern, layers, passed, kernels, rows):
    """No weight gradients, no gradients of activations before the first trained layer, nothing in the optimizer."""
    config = common.get_config()
    config.update(model="llava-v1.5-7b", max_length=2048, batch_rows=1, image_slots=1, label_slots=2048)
    config.trainable = ((pattern, {"layers": layers} if layers else {}),)
    shapes = abstract_params(MODEL)
    training = compile.build(config, targets.parse("cpu")).training
    parts, state = training.flops, training.state
    for stack, tokens, depth, last in (("vision", 577, 23, "mlp.fc2"), ("llm", 2048, 32, "mlp.down_proj")):
        sizes = {name: math.prod(leaf.shape[1:]) for name, leaf in shapes.items() if leaf.ndim == 3}
        layer = sum(size for name, size in sizes.items() if name.startswith(f"{stack}.layers."))
        part, attention = parts[stack], parts[f"{stack} attention"]
        assert part.weights == 2 * tokens * layer * kernels[stack]
        assert part.activations == pytest.approx(2 * tokens * layer * passed[stack])
        assert part.recomputed == pytest.approx(
            2 * tokens * (layer - sizes[f"{stack}.layers.{last}.kernel"]) * passed[stack]
        )
        assert attention.activations == pytest.approx(2 * attention.forward * passed[stack] / depth)
    assert parts["projector"].activations == parts["projector"].forward * (passed["vision"] > 0)
    assert parts["projector"].weights == parts["logits"].weights == 0
    assert parts["logits"].activations == parts["logits"].forward

    trained = sum(leaf.size for leaf in state.trainable.values())
    assert {leaf.shape[0] for name, leaf in state.trainable.items() if ".layers." in name} == {rows}
    for moment_dtype, bytes_each in (("", 2 * 4), ("bfloat16", 2 + 4)):
        config.moment_dtype = moment_dtype
        state = compile.build(config, targets.parse("cpu")).training.state
        moments = [leaf for leaf in jax.tree.leaves(state.optimizer) if leaf.ndim]  # the rest are counters
        assert sum(leaf.size * leaf.dtype.itemsize for leaf in moments) == bytes_each * trained


def test_formula_agrees_with_tiles_and_a_trained_newline(monkeypatch):
    monkeypatch.setitem(PRESETS, "tiny", tiny.config(image_aspect="anyres", anyres=AnyRes()))
    config = common.get_config()
    config.update(stage="finetune", model="tiny", remat="full", max_length=128, batch_rows=4, rows_per_group=2)
    config.update(image_aspect="anyres", image_slots=7, label_slots=48)
    program = compile.build(config, targets.parse("cpu"))
    assert "image_newline" in program.training.state.trainable
    compiled = compile.compile_program(program)
    assert compiled.cost.flops == pytest.approx(flops.executed_flops(program.training.flops), rel=0.01)
    config.trainable = (("image_newline", "newline"),)
    program = compile.build(config, targets.parse("cpu"))
    compiled = compile.compile_program(program)
    assert compiled.cost.flops == pytest.approx(flops.executed_flops(program.training.flops), rel=0.01)


def test_seven_billion_parameters_take_six_flops_each_and_token():
    """6 N T when all is trained, 4 N T when gradients only pass through; N without embeddings, which are looked up."""
    shapes = abstract_params(MODEL)
    N = sum(value.size for name, value in shapes.items() if name.startswith("llm.layers") and value.ndim == 3)
    head = shapes["llm.lm_head.kernel"].size
    trained = flops.step_flops(MODEL, ROW, BOTH, "full")
    assert trained["llm"].needed == 6 * N * 2048 and trained["logits"].needed == 6 * head * 2048
    frozen = flops.step_flops(MODEL, ROW, PROJECTOR, "full")
    assert frozen["llm"].needed == 4 * N * 2048 and frozen["logits"].needed == 4 * head * 2048
    # A layer's last product is not computed again.
    down = shapes["llm.layers.mlp.down_proj.kernel"].size
    assert trained["llm"].recomputed == 2 * (N - down) * 2048


def test_a_step_with_adapters_has_two_thirds_of_the_flops():
    """4 N T instead of 6 N T, without remat, and the products of the adapters.

    Adapters of rank R at a product [I, O] have R (1 / I + 1 / O) of its FLOPs.
    """
    targets = (r"llm\.layers\..*_proj",)
    model = dataclasses.replace(MODEL, lora=LoraConfig(1, 2.0, targets))
    trainable = PROJECTOR | {name for name in abstract_params(model) if ".lora." in name}
    full, ours = (flops.step_flops(*of, "none") for of in ((MODEL, ROW, BOTH), (model, ROW, trainable)))
    assert (ours["llm"].needed + ours["adapters"].needed) / full["llm"].needed == pytest.approx(2 / 3, rel=1e-3)
    published = dataclasses.replace(model, lora=LoraConfig(128, 256.0, targets))
    share = flops.step_flops(published, ROW, trainable, "none")["adapters"].needed / ours["llm"].needed
    kernels = [
        leaf.shape[1:]
        for name, leaf in abstract_params(MODEL).items()
        if name.startswith("llm.layers") and leaf.ndim == 3
    ]
    added = sum(128 * (inputs + outputs) for inputs, outputs in kernels) / sum(map(math.prod, kernels))
    assert share == pytest.approx(3 / 2 * added) == pytest.approx(0.074, abs=1e-3)


def test_only_what_is_trained_has_optimizer_state(monkeypatch):
    program = adapted("none", monkeypatch).training
    trained = sum(leaf.size for leaf in program.state.trainable.values())
    assert {name.partition(".")[0] for name in program.state.trainable} == {"projector", "llm"}
    assert all(".lora." in name or name.startswith("projector.") for name in program.state.trainable)
    moments = [leaf for leaf in jax.tree.leaves(program.state.optimizer) if leaf.ndim]
    assert sum(leaf.size * leaf.dtype.itemsize for leaf in moments) == 2 * 4 * trained


def test_the_tower_runs_forward_only_and_not_its_last_layer():
    shapes = abstract_params(MODEL)
    part = flops.step_flops(MODEL, ROW, BOTH, "full")["vision"]
    used = sum(value.size for name, value in shapes.items() if name.startswith("vision.layers") and value.ndim == 3)
    used *= MODEL.vision_layers_used / MODEL.vision.num_layers
    patches = shapes["vision.patch_embedding.kernel"].size
    assert part.forward == pytest.approx(2 * 577 * used + 2 * 576 * patches)
    assert part.activations == part.weights == part.recomputed == 0
    empty = flops.step_flops(MODEL, dataclasses.replace(ROW, image_slots=0), BOTH, "full")
    assert empty["vision"].forward == empty["projector"].needed == 0


def test_gradients_end_at_the_first_trained_layer_of_a_projector_of_many():
    model = tiny.config(projector_type="mlp12x_gelu")
    layout, D = Layout(1, 1, 8, 1, 8, model.image_tokens, model.vision.image_size), model.text.hidden_size
    part = flops.step_flops(model, layout, ["projector.linear_10.kernel"], "none")["projector"]
    assert part.forward == 2 * model.image_tokens * (model.feature_size * D + 11 * D * D)
    assert (part.activations, part.weights) == (2 * model.image_tokens * 2 * D * D, 2 * model.image_tokens * D * D)


def test_utilisation_by_convention():
    """Half of the decoder's attention is all that the conventions differ in; what remat adds is in neither."""
    parts = flops.step_flops(MODEL, ROW, BOTH, "full")
    full, causal = (flops.model_flops(parts, convention) for convention in flops.CONVENTIONS)
    assert full - causal == parts["llm attention"].needed / 2 == 3 * 4 * 2048**2 * 4096 * 32 / 2
    assert full == flops.model_flops(flops.step_flops(MODEL, ROW, BOTH, "none"), "full") < flops.executed_flops(parts)
    assert flops.mfu(parts, 2.0, 4, full / 4)["full"] == 0.5


def test_policies_recompute_less_the_more_they_keep():
    again = {
        remat: sum(part.recomputed for part in flops.step_flops(MODEL, ROW, BOTH, remat).values())
        for remat in flops.RECOMPUTED
    }
    assert again["none"] < again["save_qkv"] < again["full"] == again["offload"]
