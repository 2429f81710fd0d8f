"""Built data sets as a source: what LLaVA JSON and a folder give, wherever it is read."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from llava_jax.cli import UserError
from llava_jax.data import build
from llava_jax.data.built import Built
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.lengths import cached_lengths, measure
from llava_jax.data.pipeline import Batches, ImageDecoder
from llava_jax.data.plan import Order, plan_layout
from llava_jax.data.sources import LlavaJson, Source
from llava_jax.data.templates import get_template
from llava_jax.data.tokenization import load_tokenizer


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> tuple[Path, Path]:
    return tiny.data(tmp_path_factory.mktemp("data"), 11)


@pytest.fixture(scope="module")
def built(data, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("built") / "set"
    build.main(["--json", str(data[0]), "--images", str(data[1]), "--output", str(output), "--shards", "3"])
    return output


def test_it_is_the_json_and_the_folder_that_it_is_made_of(data, built):
    source, folder = Built(built), LlavaJson(*data)
    for made in (source, pickle.loads(pickle.dumps(source))):
        assert list(made) == list(folder) and made[-1] == folder[10] and made.digest == folder.digest
        for index, sample in enumerate(folder):
            for count in range(len(sample.images) + 1):
                assert made.read_images(index, sample.images[:count]) == folder.read_images(
                    index, sample.images[:count]
                )
    with pytest.raises(IndexError):
        source[11]
    assert len(pickle.dumps(source)) < 2000, "what travels to workers must not grow with the samples"


def test_nothing_outside_of_it_is_opened_or_imported(built, tmp_path, monkeypatch):
    """TFDS imports whatever modules features.json names, such as one in the current directory."""
    shutil.copytree(built, tmp_path / "set")
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    file = tmp_path / "set" / "features.json"
    features = file.read_text()
    for name in ("pythonClassName", "python_class_name", "python\\u0043lassName"):
        file.write_text(features.replace("pythonClassName", name).replace(
            "tensorflow_datasets.core.features.text_feature.Text", "evil.Text"))  # fmt: skip
        with pytest.raises(UserError, match="features.json: has features of type 'evil.Text', not of TFDS"):
            Built(tmp_path / "set")
    file.write_text(features.replace("tensorflow_datasets.core.features.features_dict.FeaturesDict", "evil.Dict", 1))
    with pytest.raises(UserError, match="of type 'evil.Dict'"):
        Built(tmp_path / "set")
    assert not (tmp_path / "ran").exists()


def batches(source: Source) -> Batches:
    encode = TextEncoder(get_template("v1"), tiny.tokenizer(), image_tokens=4, max_length=96)
    order = Order(np.arange(len(source)), 4, 0)
    sizes = {"rows_per_group": 2, "max_length": 96, "image_tokens": 4, "image_size": 16}
    encoded = EncodedSource(source, encode)
    layout = plan_layout([(order, 6)], measure(encoded), **sizes)
    return Batches(encoded, ImageDecoder(16, "pad", (0.5, 0.5, 0.5)), order, layout)


@pytest.mark.parametrize("workers", [0, 2])
def test_its_batches_are_those_of_the_json_with_and_without_workers(data, built, workers):
    expected = batches(LlavaJson(*data))
    for step, (batch, _, _) in enumerate(batches(Built(built)).iterate(0, 6, workers)):
        for name, array in batch.items():
            np.testing.assert_array_equal(array, expected[step][name], err_msg=name)


def test_stored_lengths_are_those_of_training_and_go_to_the_cache(data, tmp_path, monkeypatch):
    tiny.tokenizer().save_pretrained(tmp_path / "tokenizer")
    output = tmp_path / "set"
    options = [
        "--tokenizer",
        str(tmp_path / "tokenizer"),
        "--template",
        "v1",
        "--max-length",
        "96",
        "--image-tokens",
        "4",
    ]
    build.main(["--json", str(data[0]), "--images", str(data[1]), "--output", str(output), *options])
    encode = TextEncoder(get_template("v1"), load_tokenizer(tmp_path / "tokenizer"), image_tokens=4, max_length=96)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "another machine"))
    folder = EncodedSource(LlavaJson(*data), encode)
    assert cached_lengths(folder) is None
    found = cached_lengths(EncodedSource(Built(output), encode))
    for values, measured in zip(found, measure(folder), strict=True):
        np.testing.assert_array_equal(values, measured)


def test_what_is_none_or_not_finished_or_damaged_is_told(built, tmp_path):
    with pytest.raises(UserError, match="is none .a data set that llava_jax.data.build makes"):
        Built(tmp_path)
    broken = Path(shutil.copytree(built, tmp_path / "broken"))
    shard = next(broken.glob("*00001-of-00003"))
    content = bytearray(shard.read_bytes())
    content[300] ^= 1  # in its first record
    shard.write_bytes(content)
    source = Built(broken)
    index = next(i for i in range(3, 11) if source[i].images)
    with pytest.raises(UserError, match=f"its record in {broken} is damaged"):
        for index in range(3, 7):
            source.read_images(index, source[index].images[:1])
    metadata = json.loads((broken / "metadata.json").read_text())
    assert metadata["samples"] == 11
    (broken / "dataset_info.json").unlink()
    with pytest.raises(UserError, match="is not finished: run the same build again"):
        Built(broken)


@pytest.mark.parametrize(
    "name", ["dataset_info.json", "features.json", "metadata.json", "text_offsets.npy", "text.jsonl"]
)
def test_damaged_files_are_one_line(built, tmp_path, name):
    """Whatever part of one is lost or is other bytes."""
    file = Path(shutil.copytree(built, tmp_path / "broken")) / name
    whole = file.read_bytes()
    for content in (b"", whole[: len(whole) // 2], b"[" * 10**5, b"\xff" * 100, b"{}", b'{"digest": 7}', b"null"):
        file.write_bytes(content)
        with pytest.raises(UserError, match="(damaged|is no JSON|is not a JSON|is no UTF-8|texts, )"):
            list(Built(file.parent))


def test_shards_are_those_of_the_folder_whatever_is_named(built, tmp_path):
    info = Path(shutil.copytree(built, tmp_path / "moved")) / "dataset_info.json"
    value = json.loads(info.read_text())
    value["splits"][0]["filepathTemplate"] = f"{built}/{value['splits'][0]['filepathTemplate']}"
    info.write_text(json.dumps(value))
    shutil.copytree(info.parent, tmp_path / "other")
    for shard in (tmp_path / "other").glob("*array_record*"):
        shard.unlink()
    assert list(Built(info.parent)) == list(Built(built))
    with pytest.raises((UserError, RuntimeError, ValueError, OSError)):
        Built(tmp_path / "other").read_images(1, ["a.jpg"])
