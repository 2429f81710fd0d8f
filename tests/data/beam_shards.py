"""On Apache Beam the same builder writes the same bytes: `make test-beam`, which installs the extra `beam`."""

import pytest
from built_sets import contents, run

from llava_jax.cli import UserError


def test_the_local_runner_gives_identical_shards(data, built, tmp_path):
    output = run(data, tmp_path / "set", "--shards", 4, "--beam", "runner=DirectRunner")
    assert contents(output) == contents(built)


def test_workers_report_damaged_pictures_and_it_goes_on(data, built, tmp_path, capsys):
    picture = data[1] / "d.webp"
    content = picture.read_bytes()
    output = tmp_path / "set"
    try:
        picture.write_bytes(content[:-20])
        with pytest.raises(UserError, match="^2 images cannot be read"):
            run(data, output, "--shards", 4, "--beam", "runner=DirectRunner")
    finally:
        picture.write_bytes(content)
    assert [line.split(",")[1] for line in capsys.readouterr().out.splitlines()] == [" s5", " s7"]
    run(data, output, "--beam", "runner=DirectRunner")
    assert contents(output) == contents(built)
