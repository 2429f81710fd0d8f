"""The report of packing plans."""

import json
from pathlib import Path

import pytest
import tiny

from llava_jax.cli import UserError
from llava_jax.data import pack


@pytest.fixture(scope="module")
def flags(tmp_path_factory) -> list[str]:
    directory = tmp_path_factory.mktemp("data")
    file, _ = tiny.data(directory, samples=40)
    tiny.tokenizer().save_pretrained(directory / "tokenizer")
    return [
        *("--json", str(file), "--tokenizer", str(directory / "tokenizer"), "--template", "v1"),
        *("--image-tokens", "4", "--max-length", "64"),
    ]


def test_the_report_and_what_it_suggests(flags, tmp_path, capsys):
    out = tmp_path / "plans.json"
    pack.main([*flags, "--row-length", "64,256", "--rows-per-group", "1,2", "--json-out", str(out)])
    report = json.loads(out.read_text())
    told = capsys.readouterr().out
    assert report["samples"] == 40 and "40 samples of" in told
    sizes = {(plan["row_length"], plan["rows_per_group"]) for plan in report["plans"] if plan["best"]}
    assert sizes == {(64, 1), (64, 2), (256, 1), (256, 2)}
    kinds = [plan["kind"] for plan in report["plans"]]
    assert kinds[:4] == ["unpacked", "by modality"] * 2 and set(kinds[4:]) == {"packed"}
    for plan in report["plans"]:
        assert plan["samples_a_row"] * plan["rows"] == pytest.approx(40, abs=0.1)
        assert 0 < plan["positions_used"] <= 1 and 0 < plan["image_slots_used"] <= 1
    assert f"suggested  --config.pack=True --config.row_length={report['suggested']['row_length']}" in told


def test_enough_in_short_rows_is_better_than_more_in_long_ones():
    def plan(row_length, positions, images):
        return pack.Plan("packed", row_length, 4, 9, 50, 3.0, 10, positions, images, 0.5, 0.1, True)

    assert pack.suggested([plan(1, 0.96, 0.99), plan(2, 0.97, 0.95), plan(3, 0.99, 0.99)]).row_length == 2
    assert pack.suggested([plan(1, 0.96, 0.9), plan(2, 0.99, 0.94)]).row_length == 2
    assert pack.flags(plan(2, 0.97, 0.95), 128).endswith("--config.image_slots=9 --config.batch_rows=44")


def test_wanted_slots_are_planned_alone_and_sizes_that_do_not_fit_are_refused(flags, capsys):
    pack.main([*flags, "--image-slots", "3"])
    assert "--config.image_slots=3" in capsys.readouterr().out
    with pytest.raises(UserError, match="--row-length 20: samples have up to"):
        pack.main([*flags, "--row-length", "20"])


def test_mistakes_on_the_command_line(flags, capsys):
    with pytest.raises(SystemExit):
        pack.main([*flags, "--rows-per-group", "0"])
    assert "0 is less than 1" in capsys.readouterr().err


def test_tiles_of_anyres_count_as_slots(flags, tmp_path, capsys):
    images = str(Path(flags[1]).parent / "images")
    pack.main([*flags, "--max-length", "128", "--anyres", "--images", images, "--image-size", "16"])
    assert (
        "and 3.75 image slots; 25.0% without images" in capsys.readouterr().out
    )  # 5 tiles of each of three images in four samples
    with pytest.raises(SystemExit):
        pack.main([*flags, "--anyres"])
    assert "--anyres needs --images" in capsys.readouterr().err
    with pytest.raises(UserError, match="--image-tokens 5: the features of a tile are no square"):
        pack.main([*flags, "--anyres", "--images", images, "--image-tokens", "5"])
