"""The training step compiled for a TPU slice and for GPUs: memory, FLOPs and bytes of a small model; the command."""

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny

from configs import common, finetune, llava_next
from llava_jax.cli import UserError
from llava_jax.models.config import PRESETS, LlavaConfig, TextConfig, VisionConfig
from llava_jax.models.llava import abstract_params, used_params
from llava_jax.parallel.hardware import GiB
from llava_jax.preflight import __main__ as preflight
from llava_jax.preflight import compile as ahead
from llava_jax.preflight import search, targets, text
from llava_jax.preflight.report import Report, report

targets.prepare_environment()
pytestmark = pytest.mark.usefixtures("optimized")

MiB = 2**20
# Two layers as wide as is quick to compile; heads of 128 and a short text, as kernels for attention want it.
SMALL = LlavaConfig(
    VisionConfig(256, 512, 3, 4, image_size=56, patch_size=14),
    TextConfig(4096, 1024, 2816, 2, 8, 8, 128),
)
TARGETS = ["v5e:2x2", "h100:4"]
# Target -> MiB of the peak of the small model's step, measured; regressions show here.
PEAKS = {"v5e:2x2": 200, "h100:4": 240}


@pytest.fixture(autouse=True)
def small_model(monkeypatch):
    monkeypatch.setitem(PRESETS, "small", SMALL)


def small_config(**changes):
    config = common.get_config()
    config.update(stage="finetune", model="small", batch_rows=8, max_length=256, max_rows_per_device=2)
    config.update(changes)
    return config


@pytest.fixture(scope="module")
def reports():
    """Target -> the report of the small model, compiled once."""

    @functools.cache
    def of(name: str) -> Report:
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(PRESETS, "small", SMALL)
            return report(small_config(), name)

    return of


@pytest.mark.parametrize("name", TARGETS)
def test_memory(reports, name):
    found = reports(name)
    memory = found.memory
    names = abstract_params(SMALL)
    parameters = sum(value.size for value in names.values())
    trained = sum(value.size for name, value in names.items() if not name.startswith("vision."))
    assert found.fits and found.devices == 4 and found.rows_per_device == 2
    # A quarter each: float32 with two moments where it is trained, bfloat16 where frozen.
    assert memory.optimizer == pytest.approx(2 * trained, rel=0.01)
    assert memory.parameters == pytest.approx(trained + (parameters - trained) / 2, rel=0.01)
    parts = ("parameters", "optimizer", "batch", "activations", "margin")
    assert memory.needed == pytest.approx(sum(getattr(memory, part) for part in parts))
    peak = (memory.needed - memory.margin) / MiB
    assert 0.8 * PEAKS[name] < peak <= PEAKS[name]


@pytest.mark.parametrize("name", TARGETS)
def test_flops_are_those_of_the_formula(reports, name):
    compiled = reports(name).compiled
    assert compiled.ratio == pytest.approx(1, abs=0.01)
    assert compiled.recomputed == 0 and not compiled.loops_of_unknown_length


def counts(found: Report) -> dict[str, Any]:
    """What the compiled step does, in counts that do not depend on the machine that compiles."""
    return {
        "flops": found.compiled.flops,
        "sent": found.collectives.wire,
        "collectives": {f"{row['kind']} {row['dtype']}": row["count"] for row in found.collectives.kinds},
        "kernels": found.compiled.kernels,
        "predicted microseconds": round(found.prediction.seconds * 1e6, 1),
    }


@pytest.mark.parametrize("name", TARGETS)
def test_counts_are_those_of_before(reports, name):
    """If one changes, counts.json changes with it, and the commit says why."""
    expected = json.loads(Path(__file__).with_name("counts.json").read_text())
    found = counts(reports(name))
    assert found == expected[name] | {
        "predicted microseconds": pytest.approx(expected[name]["predicted microseconds"], rel=0.01)
    }


@pytest.mark.parametrize("name", TARGETS)
def test_no_more_is_sent_than_has_to_be(reports, name):
    """And no weights in float32."""
    collectives = reports(name).collectives
    assert collectives.ratio == pytest.approx(1, abs=0.02)
    float32 = [row["wire"] for row in collectives.kinds if row["dtype"] == "f32"]
    assert sum(float32) < 0.01 * collectives.wire


@pytest.mark.parametrize("name", TARGETS)
def test_time_is_bounded_by_the_slowest_of_three(reports, name):
    bound = reports(name).bound
    seconds = bound.seconds
    assert seconds["step"] == max(seconds["compute"], seconds["memory"], seconds["network"]) > 0
    assert 0 < bound.mfu["causal"] < bound.mfu["full"] <= 1


@pytest.mark.parametrize("name", TARGETS)
def test_the_time_of_a_step_is_predicted(reports, name):
    found, bound = reports(name).prediction, reports(name).bound
    assert found.low < found.seconds < found.high
    assert found.seconds > bound.seconds["compute"]
    assert found.seconds == pytest.approx(sum(sum(kinds.values()) for kinds in found.parts.values()))
    waiting = sum(kinds["communication"] for kinds in found.parts.values())
    assert 0 <= found.exposed_communication == pytest.approx(waiting)
    assert {"vision", "projector", "qkv", "attention", "mlp", "logits"} <= set(found.parts)
    totals = [one["seconds"] * one["times"] for one in found.longest]
    assert len(totals) == 10 and totals == sorted(totals, reverse=True) and sum(totals) < found.seconds
    assert found.tokens_per_second_per_device == pytest.approx(8 * 256 / 4 / found.seconds)
    assert 0 < found.mfu["causal"] < found.mfu["full"] < bound.mfu["full"]


def test_the_first_stage_holds_no_optimizer_for_what_is_frozen():
    found = report(small_config(stage="pretrain"), "h100:4")
    trained = 2 * 4 * (256 * 1024 + 1024 * 1024) / 4
    assert found.memory.optimizer == pytest.approx(trained, rel=0.05)
    assert found.compiled.ratio == pytest.approx(1, abs=0.01)


def test_packed_rows_may_be_longer_and_hold_as_many_images_as_fit():
    model = PRESETS["small"]
    assert model.image_tokens == 16
    layout = ahead.worst_layout(small_config(pack=True, row_length=1000, rows_per_group=4), model)
    assert (layout.max_length, layout.image_slots, layout.label_slots) == (1000, 4 * 62, 4000)
    layout = ahead.worst_layout(small_config(pack=True, rows_per_group=4, image_slots=19, label_slots=500), model)
    assert (layout.max_length, layout.image_slots, layout.label_slots) == (256, 19, 500)


def test_the_worst_rows_with_anyres_have_all_tiles():
    """Of LLaVA-1.6: a base and 2 x 2 tiles. Packed rows may have thin images, of which one row of the map is left."""
    model, config = PRESETS["llava-v1.6-vicuna-7b"], llava_next.get_config("7b")
    assert ahead.worst_layout(config, model).image_slots == 5
    with config.unlocked():
        config.update(pack=True, row_length=8192, rows_per_group=2)
    assert ahead.worst_layout(config, model).image_slots == 2 * (8192 // (576 + 49)) * 5


def test_libtpu_says_what_does_not_fit():
    config = small_config(batch_rows=4096, max_rows_per_device=0, remat="none")
    found = report(config, "v5e:1x1")
    assert not found.fits and found.memory.needed > found.memory.available == 15.75 * GiB
    assert found.reason.startswith("libtpu: ") and "exceeds available HBM (15.75G)" in found.reason
    assert "\n" not in found.reason
    assert found.remedies[:2] == (
        "--config.max_rows_per_device=2048 (now 4096 rows at once)",
        "--config.remat=full",
    )
    assert "unfit      libtpu" in found.to_text()


def test_gpus_are_measured_against_the_part_that_jax_takes(reports):
    """Here by the search for the largest batch, none of which fits."""
    memory = reports("h100:4").memory
    assert memory.needed > memory.margin >= 2 * GiB
    found = search.largest_batch(
        small_config(batch_rows=4), "h100:4", (memory.margin + MiB) / (memory.available / 0.75)
    )
    assert not found.fits and "margin" in found.reason and found.memory.needed < memory.needed
    assert found.tried == {1: False} and (found.rows_per_device, found.batch_rows, found.search) == (1, 4, "batch")


def progress(shown: str) -> list[tuple[int, int | None]]:
    """The number of each try of a search, and how many there are at most, if that is known."""
    tries = re.findall(
        r"^try (\d+)(?: of at most (\d+)(?:, at most \d+:\d\d:\d\d left)?)?: .", shown, flags=re.MULTILINE
    )
    return [(int(number), int(most) if most else None) for number, most in tries]


@pytest.mark.parametrize("limit", range(10))
def test_the_largest_batch_is_found_with_few_compilations(limit, reports, monkeypatch, capsys):
    def fake(config, name, memory_fraction):
        rows = config.max_rows_per_device
        return dataclasses.replace(found, rows_per_device=rows, batch_rows=config.batch_rows, fits=rows <= limit)

    found = reports("h100:4")
    monkeypatch.setattr(search, "report", fake)
    result = search.largest_batch(small_config(), "h100:4")
    assert result.rows_per_device == max(limit, 1) and result.fits == (limit > 0)
    assert result.tried == {rows: rows <= limit for rows in result.tried} and not result.tried[limit + 1]
    assert result.batch_rows % (4 * result.rows_per_device) == 0 and len(result.tried) <= 8
    shown = progress(capsys.readouterr().err)
    assert len(shown) == len(result.tried) and not any(most for _, most in shown if most and most != len(shown))


def test_smallest_slice(reports, monkeypatch):
    """Two layers of 2.7e9 parameters each with two moments: 64 GB, of which an H100 does not have as many for JAX. This
    is known without a compiler, which is asked about the others in their order."""

    def fake(config, name, memory_fraction):
        compiled.append((name, config.max_rows_per_device, config.batch_rows))
        return dataclasses.replace(found, target=name, fits=name == "h100:4")

    found, compiled = reports("h100:4"), []
    monkeypatch.setattr(search, "report", fake)
    wide = dataclasses.replace(SMALL, text=TextConfig(4096, 16384, 32768, 2, 128, 128, 128))
    monkeypatch.setitem(PRESETS, "small", wide)
    result = search.smallest_slice(small_config(), "h100")
    assert compiled == [("h100:2", 2, 8), ("h100:4", 2, 8)]
    assert result.tried == {"h100:1": False, "h100:2": False, "h100:4": True}
    assert result.fits and (result.target, result.search) == ("h100:4", "slice")


def test_meshes_that_some_slices_do_not_make_are_left_out(reports, monkeypatch, capsys):
    monkeypatch.setattr(search, "report", lambda config, name, memory_fraction: reports("h100:4"))
    config = small_config()
    config.mesh.tensor = 2
    assert search.smallest_slice(config, "h100").tried == {"h100:4": True}  # two would replicate the projector
    config.mesh.tensor = 3
    with pytest.raises(UserError, match="config.mesh"):
        search.smallest_slice(config, "h100")

    def fails(config, name, memory_fraction):
        if config.mesh.tensor == 2:
            raise UserError("mesh: no such")
        return reports("v5e:2x2")

    monkeypatch.setattr(search, "report", fails)
    found = search.fastest(small_config(batch_rows=16), "v5e:2x2")
    assert found.fits and not any("tensor=2" in tried for tried in found.tried)
    assert "not possible: mesh: no such" in capsys.readouterr().err


def test_a_checkpoint_that_is_there_is_what_is_compiled(tmp_path, capsys):
    tiny.checkpoint(tmp_path, dataclasses.replace(SMALL, base_dtype="nf4"))
    config = small_config(init=str(tmp_path / "model"))
    config.lora.rank = 4
    assert ahead.build(config, targets.parse("cpu")).settings.model.base_dtype == "nf4"
    config.init = str(tmp_path / "later")
    for _ in range(2):
        assert ahead.build(config, targets.parse("cpu")).settings.model.base_dtype == ""
    assert capsys.readouterr().err.count("compiles a checkpoint of small as published instead") == 1
    config.init, config.model = str(tmp_path / "model"), "llava-v1.5-7b"
    with pytest.raises(UserError, match="is not a llava-v1.5-7b"):
        ahead.build(config, targets.parse("cpu"))


def test_a_model_must_be_named():
    with pytest.raises(UserError, match="neither config.model .* nor config.init"):
        report(small_config(model=""), "cpu")
    with pytest.raises(UserError, match="config.model is 'no-such', not one of"):
        report(small_config(model="", default_model="no-such"), "cpu")


def test_a_recipe_without_a_size_compiles_the_published_one():
    assert ahead.preset(finetune.get_config()) == "llava-v1.5-7b"
    assert ahead.preset(finetune.get_config("v0,13b")) == "llava-v0-13b"
    config = finetune.get_config()
    config.init = "runs/import"
    assert ahead.preset(config) == "", "the model is the checkpoint's"


def test_a_table_has_a_line_a_target(reports):
    results = [reports(name) for name in TARGETS]
    lines = text.table(results).splitlines()
    assert [line.split()[0] for line in lines[1:3]] == TARGETS and all(" yes " in line for line in lines[1:3])
    for result in results:
        assert "fits       " in result.to_text()
    found = dataclasses.replace(results[0], search="fastest", overrides=("--config.remat=full",), tried={"a": 2.5})
    found = dataclasses.replace(found, cost=found.epoch_cost(1.2, 665_000))
    shown = text.table([found, results[1]])
    assert f"{TARGETS[0]}: epoch      665,000 samples" in shown and f"{TARGETS[0]}:   2.5 s" in shown
    assert f"{TARGETS[0]}: fastest    --config.remat=full" in shown


def test_no_price_without_a_prediction():
    command = [sys.executable, "-m", "llava_jax.preflight", "--config=finetune:7b", "--target=h100:8,cpu"]
    told = subprocess.run([*command, "--price=1", "--samples=9"], capture_output=True, text=True)
    assert (
        told.returncode == 1 and told.stderr == "error: --price: times are predicted for TPUs and GPUs, not for cpu\n"
    )


FIELDS = (
    *("target", "fits", "devices", "device_kind", "mesh", "stage", "model", "remat", "dtype", "batch_rows"),
    *("rows_per_device", "microbatches", "max_length", "image_slots", "label_slots", "memory", "flops"),
    "compile_seconds",
)


def test_json_has_what_applies(reports):
    """Programs read it: these are its fields, in their order."""
    found = reports("h100:4")
    assert tuple(found.to_json()) == (*FIELDS, "compiled", "collectives", "bound", "prediction")
    unknown = dict.fromkeys(("compiled", "collectives", "bound", "prediction"))
    unfit = dataclasses.replace(found, fits=False, reason="too large", **unknown)
    assert tuple(unfit.to_json()) == (*FIELDS, "reason", "remedies")
    searched = dataclasses.replace(found, bound=None, search="batch", tried={1: True, 2: False})
    values = json.loads(json.dumps(searched.to_json()))
    assert tuple(values) == (*FIELDS, "compiled", "collectives", "prediction", "search", "tried")
    assert values["tried"] == {"1": True, "2": False} and values["memory"] == dataclasses.asdict(found.memory)
    assert tuple(values["flops"]) == ("parts", "model") and tuple(values["flops"]["model"]) == ("full", "causal")
    assert values["flops"]["parts"]["llm"] == dataclasses.asdict(found.flops["llm"])
    assert tuple(values["compiled"]) == (
        *("flops", "formula", "ratio", "recomputed", "recomputed_at", "kernels", "left_out", "loops_of_unknown_length"),
    )
    assert tuple(values["prediction"]) == (
        *("seconds", "low", "high", "mfu", "tokens_per_second_per_device", "exposed_communication", "parts", "longest"),
    )
    assert tuple(values["collectives"]) == ("kinds", "wire", "ideal", "ratio")
    assert tuple(values["collectives"]["kinds"][0]) == ("kind", "dtype", "count", "payload", "wire")


@pytest.mark.parametrize("name", TARGETS)
def test_a_recipes_own_table_of_what_is_trained_is_compiled(name):
    """The tower and the norms of the decoder: memory, FLOPs and bytes follow from the names."""
    found = report(small_config(trainable=({"parameters": r"vision\."}, {"parameters": r"llm\..*norm"})), name)
    used = used_params(SMALL, abstract_params(SMALL))
    trained = sum(value.size for parameter, value in used.items() if parameter.startswith("vision."))
    assert found.memory.optimizer == pytest.approx(2 * trained, rel=0.05)
    assert found.flops["vision"].weights > 0 == found.flops["llm"].weights == found.flops["projector"].weights
    assert found.compiled.ratio == pytest.approx(1, abs=0.01)
    assert found.collectives.ratio == pytest.approx(1, abs=0.05)


def test_cudnn_does_not_train_a_tower_with_an_odd_number_of_tokens():
    config = small_config(trainable=({"parameters": r"vision\."},), attention="cudnn")
    with pytest.raises(UserError, match=r"attention=cudnn cannot train a vision tower .*\(17\): set attention=chunked"):
        report(config, "h100:4")


def test_the_fastest_configuration_is_found_with_few_compilations(reports, monkeypatch, capsys):
    """Of a machine on which `kept` x rows may be at most 8, and a step takes least with many rows and little remat."""
    kept = {"none": 8, "save_qkv": 4, "full": 2, "offload": 1}
    slower = {"none": 1.0, "save_qkv": 1.2, "full": 1.5, "offload": 3.0}
    compiled = []

    def fake(config, name, memory_fraction):
        compiled.append((config.remat, config.max_rows_per_device, config.mesh.data, config.mesh.tensor))
        remat, rows = compiled[-1][:2]
        found = reports("v5e:2x2")
        seconds = (
            slower[remat] * (1 + 1 / rows) * (0.9 if config.mesh.data == 2 else 1.1 if config.mesh.tensor == 2 else 1)
        )
        return dataclasses.replace(
            found,
            fits=kept[remat] * rows <= 8,
            remat=remat,
            rows_per_device=rows,
            prediction=dataclasses.replace(found.prediction, seconds=seconds),
        )

    monkeypatch.setattr(search, "report", fake)
    monkeypatch.setattr(search, "least_seconds", lambda config, target: 0.0)
    found = search.fastest(small_config(batch_rows=16), "v5e:2x2")
    assert compiled == [
        *(("none", 1, 1, 1), ("none", 2, 1, 1), ("save_qkv", 2, 1, 1), ("save_qkv", 4, 1, 1), ("full", 4, 1, 1)),
        *(("save_qkv", 2, 2, 1), ("save_qkv", 2, 1, 2)),
    ]
    shown = capsys.readouterr().err
    assert [number for number, _ in progress(shown)] == list(range(1, len(compiled) + 1))
    assert re.search(
        r"^try 7 of at most 7, at most 0:00:\d\d left: --config.remat=save_qkv .*tensor=2$", shown, re.MULTILINE
    )
    assert all(most >= len(compiled) for _, most in progress(shown))
    assert found.overrides == ("--config.remat=save_qkv", "--config.max_rows_per_device=2", "--config.mesh.data=2")
    assert found.tried[" ".join(found.overrides)] == found.prediction.seconds == pytest.approx(0.9 * 1.2 * 1.5)
    assert list(found.tried.values()).count(None) == 2 and "fastest    --config.remat=save_qkv" in found.to_text()
    assert tuple(found.to_json())[-3:] == ("search", "tried", "overrides")
    compiled.clear()  # now a policy's least time says that it cannot win
    monkeypatch.setattr(search, "least_seconds", lambda config, target: 1e3 * (config.remat != "none"))
    assert search.fastest(small_config(batch_rows=16), "v5e:2x2").remat == "none"
    assert {remat for remat, *_ in compiled} == {"none"}


def test_an_epoch_costs_its_steps_on_all_chips(reports):
    found = reports("v5e:2x2")
    cost = found.epoch_cost(price=2.0, samples=17)  # three steps of eight rows on four chips
    assert cost["steps"] == 3 and cost["hours"] == pytest.approx(3 * found.prediction.seconds / 3600)
    assert cost["money"] == pytest.approx(cost["hours"] * 4 * 2.0)
    assert "epoch      17 samples" in dataclasses.replace(found, cost=cost).to_text()


RECIPE = """
from configs import common, finetune, llava_next
from llava_jax.models.config import PRESETS, LlavaConfig, TextConfig, VisionConfig

PRESETS["small"] = LlavaConfig(
    VisionConfig(256, 512, 3, 4, image_size=56, patch_size=14), TextConfig(4096, 1024, 2816, 2, 8, 8, 128)
)


def get_config():
    config = common.get_config()
    config.update(stage="pretrain", model="small", batch_rows=8, max_length=256, max_rows_per_device=2)
    return config.lock()
"""


def test_the_command(tmp_path):
    """Without `ptxas` on the path; what fits exits with 0, what does not with 3."""
    recipe = tmp_path / "recipe.py"
    recipe.write_text(RECIPE)
    command = [sys.executable, "-m", "llava_jax.preflight", f"--config={recipe}"]
    environment = os.environ | {"PATH": "/usr/bin:/bin", "JAX_NUM_CPU_DEVICES": "4"}

    def run(*flags: str) -> subprocess.CompletedProcess:
        return subprocess.run(command + list(flags), capture_output=True, text=True, env=environment)

    done = run("--target=h100:4", "--json", "--memory_fraction=0.5")
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["fits"] and found["target"] == "h100:4"
    assert found["memory"]["available"] == targets.parse("h100:4").machine.memory / 2
    unfit = run("--target=cpu", "--config.batch_rows=131072", "--config.max_rows_per_device=0")
    assert unfit.returncode == preflight.UNFIT, unfit.stderr
    assert "unfit      the step takes" in unfit.stdout and "max_rows_per_device=16384" in unfit.stdout


def test_mistakes_on_the_command_line():
    command = [sys.executable, "-m", "llava_jax.preflight"]
    for arguments, message in [
        (["--config=configs/finetune.py"], "--target must be given"),
        (["--config=configs/finetune.py", "--target=v5e:4x4", "--config.bach_rows=1"], "nearest is 'batch_rows'"),
    ]:
        done = subprocess.run(command + arguments, capture_output=True, text=True)
        assert done.returncode == 1 and message in done.stderr and len(done.stderr.splitlines()) == 1
