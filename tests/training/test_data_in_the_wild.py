"""A run on Parquet, or on a mixture in YAML, takes the steps that it takes on JSON and a folder of images."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from training_runs import metrics, run_config

from llava_jax.data.sources import LlavaJson
from llava_jax.training import loop


def test_the_losses_are_those_of_json_and_a_folder(world, tmp_path):
    """Parquet in two shards; a mixture of the first and the last samples, which are all in the same order."""
    source = LlavaJson(world["json"], world["images"])
    rows = []
    for index, record in enumerate(json.loads(Path(world["json"]).read_text())):
        files = source.read_images(index, source[index].images)
        images = [{"bytes": file, "path": None} for file in files]
        rows.append({"id": record["id"], "conversations": record["conversations"], "images": images})
    (tmp_path / "shards").mkdir()
    for name, part in (("a", rows[:5]), ("b", rows[5:])):
        pq.write_table(pa.Table.from_pylist(part), tmp_path / f"shards/{name}.parquet", row_group_size=2)
    entries = [{"json_path": world["json"], "sampling_strategy": s} for s in ("first:40%", "end:7")]
    (tmp_path / "mixture.yaml").write_text(json.dumps({"datasets": entries}))  # JSON is YAML

    def losses(name, **data):
        loop.train(run_config(world, steps=3, data=data), str(tmp_path / name))
        return [line["loss"] for line in metrics(tmp_path / name)]

    expected = losses("json", json=world["json"], images=world["images"])
    assert len(expected) == 3 and len(set(expected)) == 3
    assert losses("parquet", json=str(tmp_path / "shards"), images="") == expected
    assert losses("yaml", json=str(tmp_path / "mixture.yaml"), images=world["images"]) == expected
