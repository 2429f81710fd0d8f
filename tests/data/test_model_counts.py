"""data.check, data.build and data.inspect count what the model of a checkpoint sees, tiles of AnyRes included."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
from built_sets import run
from PIL import Image

from llava_jax.cli import UserError
from llava_jax.data import check, inspect, lengths
from llava_jax.data.anyres import AnyRes, Grid
from llava_jax.data.built import Built
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.features import Size
from llava_jax.data.sources import LlavaJson
from llava_jax.data.templates import get_template
from llava_jax.data.tokenization import load_tokenizer

SIZES = [(12, 12), (40, 10), (10, 40), (33, 31), (200, 150)]
ANYRES = AnyRes((Grid(2, 1), Grid(1, 2), Grid(2, 2)), several="base")
MODELS = {
    "anyres": tiny.config(image_aspect="anyres", anyres=ANYRES),
    "cls_patch": tiny.config(select_feature="cls_patch"),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """One sample for each size, and one of two images between words."""
    root = tmp_path_factory.mktemp("sizes")
    (root / "images").mkdir()
    records = []
    for number, size in enumerate(SIZES):
        Image.new("RGB", size).save(root / "images" / f"{number}.png")
        records.append({"id": f"{number}", "image": f"{number}.png", "conversations": turns("<image>\nWhat is it?")})
    text = "It is <image> and <image> red?"
    records.append({"id": "two", "image": ["0.png", "4.png"], "conversations": turns(text)})
    (root / "data.json").write_text(json.dumps(records))
    return root / "data.json", root / "images"


def turns(question):
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "It is red."}]


@pytest.fixture(scope="module", params=MODELS)
def model(request, tmp_path_factory):
    config = MODELS[request.param]
    return config, tiny.checkpoint(tmp_path_factory.mktemp("model"), config)


def encoded(source, model, max_length):
    """As training encodes the samples."""
    config, checkpoint = model
    tokenizer = load_tokenizer(checkpoint / "tokenizer")
    fields = config.image_tokens, max_length, "as_is", 0, config.tiling
    return EncodedSource(source, TextEncoder(get_template("v1"), tokenizer, *fields))


def test_lengths_of_a_check_are_those_of_the_model(data, model, tmp_path):
    flags = ["--json", str(data[0]), "--images", str(data[1]), "--checkpoint", str(model[1])]
    flags += ["--image-position", "as_is", "--report", str(tmp_path / "report.json")]
    assert check.main(flags) == 0
    expected = lengths.measure(encoded(LlavaJson(*data), model, 10_000))
    assert json.loads((tmp_path / "report.json").read_text())["lengths"]["tokens"] == expected.tokens.sum()
    assert expected.images.tolist() == [1] * len(SIZES) + [2]


def test_a_built_set_has_the_lengths_of_a_run(data, model, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "one"))
    flags = ["--checkpoint", model[1], "--max-length", 100, "--image-position", "as_is"]
    run(data, tmp_path / "built", *flags)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another"))  # of another machine
    of_run = encoded(Built(tmp_path / "built"), model, 100)
    np.testing.assert_array_equal(lengths.cached_lengths(of_run), lengths.measure(of_run))


def test_images_that_are_too_thin_or_missing_are_named_once(data, tmp_path, capsys):
    checkpoint = tiny.checkpoint(tmp_path, MODELS["anyres"])
    Image.new("RGB", (1, 20_000)).save(tmp_path / "thin.png")
    Image.new("RGB", (64, 60)).save(tmp_path / "good.png")
    names = ["thin.png", "gone.png", "good.png"]
    records = [{"id": name[:4], "image": name, "conversations": turns("<image>\nWhat is it?")} for name in names]
    (tmp_path / "data.json").write_text(json.dumps(records))
    flags = ["--json", str(tmp_path / "data.json"), "--images", str(tmp_path), "--checkpoint", str(checkpoint)]
    assert check.main([*flags, "--max-length", "60"]) == 1
    missing, thin, long = capsys.readouterr().out.splitlines()[:3]
    assert missing.startswith("missing-image, gone,")
    assert thin.startswith("image-size, thin, ") and "1 x 20000 pixels are too thin for AnyRes" in thin
    features = MODELS["anyres"].tiling.features(Size(64, 60), False)
    assert long.startswith("too-long, good, ") and f"1 images of {len(features.index)} in 5 tiles" in long


def test_inspect_shows_tiles_and_positions(data, tmp_path, capsys):
    checkpoint = tiny.checkpoint(tmp_path, MODELS["anyres"])
    flags = ["--json", str(data[0]), "--images", str(data[1]), "--checkpoint", str(checkpoint)]
    inspect.main([*flags, "--jsonl", str(tmp_path / "out.jsonl")])
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    of = MODELS["anyres"].tiling.features
    for line, size in zip(lines, SIZES, strict=False):
        features = of(Size(*size), False)
        (image,) = line["images"]
        assert (image["tiles"], image["positions"]) == (features.tiles, len(features.index))
    assert [image["tiles"] for image in lines[-1]["images"]] == [1, 1]  # several="base"
    inspect.main([*flags, "--limit", "1"])
    assert "0.png: 12 x 12 pixels, 3 tiles, " in capsys.readouterr().out


def test_images_inside_parquet_have_the_same_lengths(data, tmp_path):
    checkpoint = tiny.checkpoint(tmp_path, MODELS["anyres"])
    rows = json.loads(data[0].read_text())
    for row in rows:
        names = row.pop("image")
        files = [(data[1] / name).read_bytes() for name in ([names] if isinstance(names, str) else names)]
        row["images"] = [{"bytes": file, "path": None} for file in files]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "data.parquet")
    (tmp_path / "mixture.yaml").write_text(f"datasets:\n  - json_path: {data[0]}\n")
    found = []
    for file, more in ((data[0], ["--images", str(data[1])]), (tmp_path / "data.parquet", []),
                       (tmp_path / "mixture.yaml", ["--images", str(data[1])])):  # fmt: skip
        flags = ["--json", str(file), *more, "--checkpoint", str(checkpoint), "--image-position", "as_is"]
        assert check.main([*flags, "--report", str(tmp_path / "report.json")]) == 0
        found.append(json.loads((tmp_path / "report.json").read_text())["lengths"])
    assert found[0] == found[1] == found[2]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--anyres", "several=all"], "several is 'all', not 'tiles' or 'base'"),
        (["--anyres", "grids=2"], "--anyres grids=2"),
        (["--anyres", "colour=red"], "--anyres colour=red: .*'colour'"),
        (["--checkpoint", "nowhere"], "nowhere: no llava.json"),
    ],
)
def test_mistakes(data, flags, message):
    with pytest.raises(UserError, match=message):
        check.main(["--json", str(data[0]), "--images", str(data[1]), *flags])
