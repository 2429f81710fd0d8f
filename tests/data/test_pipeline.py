import collections
import dataclasses
import hashlib
import json
import shutil
import threading
import time

import numpy as np
import pytest
import tiny
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from configs.common import get_config
from llava_jax.cli import UserError
from llava_jax.data.anyres import AnyRes, Tiling
from llava_jax.data.encoded import EncodedSource, TextEncoder
from llava_jax.data.features import NEWLINE, TEXT, Size, joined
from llava_jax.data.images import preprocess
from llava_jax.data.lengths import lengths_name, measure
from llava_jax.data.mixture import open_data
from llava_jax.data.packing import PackedOrder, Room
from llava_jax.data.pipeline import Batches, ImageDecoder, build_row, collate
from llava_jax.data.plan import Layout, Order, plan_layout, split
from llava_jax.data.sources import LlavaJson
from llava_jax.data.templates import get_template
from llava_jax.data.tokenization import Segment

P, SIZE, LENGTH, SLOW = 4, 6, 96, 0.01
MEAN = (0.5, 0.25, 0.75)
DECODE = ImageDecoder(SIZE, "pad", MEAN)


@pytest.fixture(scope="module")
def tokenizer():
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        ["USER ASSISTANT what is the colour of it?"],
        trainers.BpeTrainer(vocab_size=320, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"]),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="</s>")


def record(number, images):
    """One sample: question and answer lengths differ from sample to sample."""
    marks = "<image>\n" * len(images)
    turns = [
        {"from": "human", "value": f"{marks}what is {'it ' * (number % 5)}?"},
        {"from": "gpt", "value": f"answer {number} {'yes ' * (number % 3)}"},
    ]
    return {"id": f"s{number}", "conversations": turns} | ({"image": images} if images else {})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 samples with no, one or two pictures each, in any mix."""
    root = tmp_path_factory.mktemp("data")
    random = np.random.default_rng(0)
    records = []
    for number in range(23):
        names = [f"{number}_{i}.png" for i in range(number % 3)]
        for name in names:
            width, height = random.integers(4, 20, 2)
            pixels = random.integers(0, 256, (height, width, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name)
        records.append(record(number, names))
    (root / "data.json").write_text(json.dumps(records))
    return root


@pytest.fixture(scope="module")
def encode(tokenizer):
    return TextEncoder(get_template("plain"), tokenizer, image_tokens=P, max_length=LENGTH)


@pytest.fixture(scope="module")
def source(folder):
    return LlavaJson(folder / "data.json", folder)


def make_batches(source, encode, batch_rows=4, rows_per_group=2, epochs=2, seed=0):
    order = Order(np.arange(len(source)), batch_rows, seed)
    layout = plan_layout(
        [(order, epochs * order.epoch_steps(0))],
        measure(EncodedSource(source, encode)),
        rows_per_group=rows_per_group,
        max_length=LENGTH,
        image_tokens=P,
        image_size=SIZE,
    )
    return Batches(EncodedSource(source, encode), DECODE, order, layout)


@pytest.fixture(scope="module")
def batches(source, encode):
    return make_batches(source, encode)


def digest(batch):
    state = hashlib.sha256()
    for name in sorted(batch):
        state.update(f"{name} {batch[name].shape} {batch[name].dtype}".encode() + batch[name].tobytes())
    return state.hexdigest()


def parts(batch, rows_per_group):
    """The samples of a batch, read back by what the model reads: (tokens, labels, pictures) each."""
    for row in range(len(batch["tokens"])):
        segments = batch["segment_ids"][row]
        for segment in range(1, segments.max() + 1):
            where = segments == segment
            np.testing.assert_array_equal(batch["positions"][row, where], np.arange(where.sum()))
            index = batch["image_feature_index"][row, where]
            index = index[index >= 0]
            slots = index[::P] // P
            np.testing.assert_array_equal(index, (slots[:, None] * P + np.arange(P)).ravel())
            pictures = batch["images"][row // rows_per_group, slots]
            yield batch["tokens"][row, where], batch["labels"][row, where], pictures


def check_sample(source, encode, folder, index, part):
    tokens, labels, pictures = part
    sample = source[index]
    text = encode(sample)
    np.testing.assert_array_equal(tokens, text.tokens)
    np.testing.assert_array_equal(labels, text.labels)
    expected = [preprocess(Image.open(folder / name), SIZE, "pad", MEAN) for name in sample.images]
    assert len(pictures) == len(expected)
    for picture, pixels in zip(pictures, expected, strict=True):
        np.testing.assert_array_equal(picture, pixels)


def test_shapes_and_types(batches):
    layout = batches.layout
    assert layout.groups == 2 and layout.image_slots == 4
    batch = batches[0]
    for name in ("tokens", "labels", "positions", "segment_ids", "image_feature_index"):
        assert batch[name].dtype == np.int32 and batch[name].shape == (4, LENGTH)
    assert batch["images"].dtype == np.uint8 and batch["images"].shape == (2, 4, SIZE, SIZE, 3)


def test_batches_hold_every_sample_once_an_epoch_as_planned(batches, source, encode, folder):
    steps_per_epoch = batches.order.epoch_steps(0)
    for epoch in range(2):
        seen = []
        for step in range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch):
            indices = [index for row in batches.order.rows(step) for index in row]
            found = list(parts(batches[step], 2))
            assert len(found) == len(indices)
            for index, part in zip(indices, found, strict=True):
                check_sample(source, encode, folder, index, part)
            assert batches.ids(step) == [f"s{index}" for index in indices]
            seen.extend(indices)
        assert sorted(seen) == list(range(23))


def test_empty_rows_and_unused_slots_are_neutral(batches):
    batch = batches[batches.order.epoch_steps(0) - 1]  # 23 samples: the last of six batches of four lacks one
    empty = ~batch["segment_ids"].any(axis=1)
    assert empty.tolist() == [False, False, False, True]
    padding = batch["segment_ids"] == 0
    for name, fill in {"tokens": 0, "labels": -100, "positions": 0, "image_feature_index": -1}.items():
        assert (batch[name][padding] == fill).all()
    for group, images in enumerate(batch["images"]):
        index = batch["image_feature_index"][2 * group : 2 * group + 2]
        used = index.max() // P + 1
        assert images[:used].any(axis=(1, 2, 3)).all() and not images[used:].any()


def test_data_without_pictures_needs_no_slots(tmp_path, encode):
    (tmp_path / "data.json").write_text(json.dumps([record(0, []), record(3, [])]))
    batch = make_batches(LlavaJson(tmp_path / "data.json", tmp_path), encode, 2, 2)[0]
    assert batch["images"].shape == (1, 0, SIZE, SIZE, 3)
    assert (batch["image_feature_index"] == -1).all()


@pytest.mark.parametrize("workers", [0, 2])
def test_iteration_equals_random_access(batches, workers):
    expected = [digest(batches[step]) for step in range(12)]
    assert len(set(expected)) == 12
    for start, stop in [(5, 12)] if workers else [(0, 12), (7, 9), (11, 12), (3, 3)]:  # processes take long to start
        assert [digest(read.batch) for read in batches.iterate(start, stop, workers)] == expected[start:stop]


def test_iteration_can_be_left(batches):
    before = threading.active_count()
    iterator = batches.iterate(0, 10**9)  # beginning takes no time, however long the run
    first = next(iterator)
    iterator.close()
    assert digest(first.batch) == digest(batches[0])
    while threading.active_count() > before:
        time.sleep(SLOW)


def test_a_process_reads_its_groups_alone_and_they_are_those_of_the_whole_batch(folder, source, encode):
    whole = make_batches(source, encode, batch_rows=8)
    read = []

    def decode(data, name):
        read.append(name)
        return DECODE(data, name)

    groups, rows = (1, 3), [2, 3, 6, 7]
    share = Batches(EncodedSource(source, encode), decode, whole.order, whole.layout, groups)
    for step, (batch, _, _) in enumerate(share.iterate(0, 3)):
        for name, array in batch.items():
            expected = whole[step][name][list(groups) if name == "images" else rows]
            np.testing.assert_array_equal(array, expected, err_msg=name)
        assert digest(share[step]) == digest(batch)
    taken = [whole.order.rows(step)[row] for step in range(3) for row in rows]
    names = {name for samples in taken for index in samples for name in source[index].images}
    assert read and set(read) <= names


def packed_batches(source, encode, groups=None, skip_bad=False):
    """Rows of up to three samples or so in four groups of two."""
    encoded = EncodedSource(source, encode, skip_bad)
    lengths, slots = measure(encoded), 7
    order = PackedOrder(np.arange(len(source)), 8, 3, lengths=lengths, room=Room(3 * LENGTH, 2, slots))
    shapes = {"rows_per_group": 2, "max_length": 3 * LENGTH, "image_tokens": P, "image_size": SIZE}
    layout = plan_layout([(order, order.steps(4))], lengths, **shapes)
    return Batches(encoded, DECODE, order, layout, groups)


def test_packed_batches_hold_every_sample_once_an_epoch(folder, source, encode):
    batches = packed_batches(source, encode)
    order = batches.order
    assert np.diff(order.epoch_rows(0).starts).max() >= 3
    for epoch in range(2):
        seen = []
        for step in range(order.steps(epoch), order.steps(epoch + 1)):
            indices = [index for row in order.rows(step) for index in row]
            for index, part in zip(indices, parts(batches[step], 2), strict=True):
                check_sample(source, encode, folder, index, part)
            seen += indices
        assert sorted(seen) == list(range(23))


@pytest.mark.parametrize("workers", [0, 3])
def test_packed_batches_depend_on_neither_workers_nor_processes_nor_restarts(folder, source, encode, workers):
    """One, two or four processes, each with its groups; some begin in the middle, on another number of hosts."""
    whole = packed_batches(source, encode)
    steps = whole.order.steps(3)
    expected = [digest(whole[step]) for step in range(steps)]
    assert len(set(expected)) == steps >= 3
    for processes, start in ((1, 1),) if workers else ((1, 0), (2, 1), (4, 2)):
        shares = np.split(np.arange(4), processes)
        runs = [packed_batches(source, encode, share).iterate(start, steps, workers) for share in shares]
        for step, of_processes in enumerate(zip(*runs, strict=True), start):
            batch = {
                name: np.concatenate([part.batch[name] for part in of_processes]) for name in of_processes[0].batch
            }
            assert digest(batch) == expected[step]


class CountingSource(LlavaJson):
    """Counts how often each record is parsed."""

    def __getitem__(self, index):
        self.parsed[index] += 1
        return super().__getitem__(index)


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_record_is_parsed_once_to_measure_it_and_once_to_read_it(tmp_path, folder, source, encode, skip_bad):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    if skip_bad:
        (tmp_path / "5_1.png").write_bytes(b"no picture")
    counting = CountingSource(tmp_path / "data.json", tmp_path)
    counting.parsed = collections.Counter()
    batches = packed_batches(counting, encode, skip_bad=skip_bad)
    assert counting.parsed == dict.fromkeys(range(23), 1)
    counting.parsed.clear()
    assert sum(len(read.bad) for read in batches.iterate(0, batches.order.steps(1))) == skip_bad
    assert counting.parsed == dict.fromkeys(range(23), 1)


@pytest.mark.parametrize("workers", [0, 1])
def test_skipped_samples_stay_in_their_places(tmp_path, folder, source, encode, workers):
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    (tmp_path / "5_1.png").write_bytes(b"no picture")
    (tmp_path / "8_0.png").unlink()
    damaged = LlavaJson(tmp_path / "data.json", tmp_path)
    whole = packed_batches(source, encode)
    batches = packed_batches(damaged, encode, skip_bad=True)
    steps, found = whole.order.steps(1), []
    for step, (batch, rows, bad) in enumerate(batches.iterate(0, steps, workers)):
        assert rows == whole.order.rows(step)
        found += bad
        np.testing.assert_array_equal(batch["tokens"], whole[step]["tokens"])
        indices = [index for row in whole.order.rows(step) for index in row]
        for index, (_, labels, pictures), (_, others, good) in zip(
            indices, parts(batch, 2), parts(whole[step], 2), strict=True
        ):
            skipped = index in (5, 8)
            np.testing.assert_array_equal(labels, np.full_like(others, -100) if skipped else others)
            np.testing.assert_array_equal(pictures, np.zeros_like(good) if skipped else good)
    assert sorted(one.id for one in found) == ["s5", "s8"]
    assert all(f"sample {one.id}: image" in one.reason for one in found)


def test_a_sample_whose_text_is_at_fault_takes_no_position(source, folder, tokenizer):
    short = TextEncoder(get_template("plain"), tokenizer, image_tokens=P, max_length=2 * P)
    encoded = EncodedSource(source, short, skip_bad=True)
    lengths = measure(encoded)
    faulty = np.flatnonzero(lengths.tokens == 0)
    assert 0 < len(faulty) < 23
    assert [one.index for one in encoded.bad_texts(faulty.tolist())] == faulty.tolist()
    batches = packed_batches(source, short, skip_bad=True)
    rows = [row for step in range(batches.order.steps(1)) for row in batches.order.rows(step)]
    assert sorted(index for row in rows for index in row) == list(range(23))
    for step, (batch, _, bad) in enumerate(batches.iterate(0, batches.order.steps(1))):
        assert not bad
        taken = lengths.tokens[[index for row in batches.order.rows(step) for index in row]]
        assert (batch["segment_ids"] > 0).sum() == taken.sum()


def test_seed_changes_the_batches_and_nothing_else_does(folder, source, encode, batches):
    again = make_batches(LlavaJson(folder / "data.json", folder), encode)
    other = make_batches(source, encode, seed=1)
    assert digest(again[3]) == digest(batches[3]) != digest(other[3])


def test_held_out_samples_are_read_in_order(folder, source, encode):
    train, valid = split(len(source), 5, seed=0)
    order = Order(valid, 4, seed=None)
    batches = make_batches(source, encode)
    held_out = Batches(EncodedSource(source, encode), DECODE, order, batches.layout)
    ids = [name for step in range(order.epoch_steps(0)) for name in held_out.ids(step)]
    assert ids == [f"s{index}" for index in valid]
    assert not {f"s{index}" for index in train} & set(ids)
    found = [part for read in held_out.iterate(0, order.epoch_steps(0)) for part in parts(read.batch, 2)]
    for index, part in zip(valid, found, strict=True):
        check_sample(source, encode, folder, index, part)


def test_shares_of_the_measuring_are_the_whole(source, encode):
    encoded = EncodedSource(source, encode)
    whole = measure(encoded)
    for first in range(3):
        for part, expected in zip(measure(encoded, first=first, stride=3), whole, strict=True):
            np.testing.assert_array_equal(part, expected[first::3])


def test_measure(source, encode):
    lengths = measure(EncodedSource(source, encode))
    rows = [encode(sample) for sample in source]
    assert lengths.tokens.tolist() == [len(row.tokens) for row in rows]
    assert lengths.images.tolist() == [len(sample.images) for sample in source]
    for row, targets in zip(rows, lengths.targets, strict=True):
        predicted = [t for t in range(len(row.labels) - 1) if row.labels[t + 1] != -100]
        assert len(predicted) == targets > 0


def test_first_label_is_no_target(source):
    def encode(sample):
        return Segment(np.arange(3), np.array([7, -100, 8]), np.full(3, -1), 0, 0)

    assert set(measure(EncodedSource(source, encode)).targets) == {1}


def test_nothing_to_learn_is_an_error_naming_the_sample(source, tokenizer):
    short = TextEncoder(get_template("plain"), tokenizer, image_tokens=P, max_length=2 * P)
    with pytest.raises(UserError, match="sample s.*nothing to learn"):
        measure(EncodedSource(source, short))


@pytest.mark.parametrize(
    "name, workers, message",
    [
        ("good.png", 0, None),
        ("none.png", 0, "{folder}/none.png: No such file"),
        ("bad.png", 0, "bad.png is damaged"),
        ("none.png", 1, "{folder}/none.png: No such file"),  # an error crosses from the process that reads
    ],
)
def test_missing_and_damaged_pictures_name_sample_and_file(tmp_path, encode, name, workers, message):
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    (tmp_path / "bad.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    (tmp_path / "data.json").write_text(json.dumps([record(3, [name])]))
    batches = make_batches(LlavaJson(tmp_path / "data.json", tmp_path), encode, 1, 1)
    if message is None:
        assert len(list(batches.iterate(0, 1, workers))) == 1
        return
    with pytest.raises(UserError) as caught:
        list(batches.iterate(0, 1, workers))
    assert str(caught.value).startswith(f"sample s3: image {message.format(folder=tmp_path)}")
    assert "\n" not in str(caught.value)


def test_images_that_truncation_drops_are_not_read(tmp_path, tokenizer):
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.png")
    turns = [("human", "<image>"), ("gpt", "yes " * 9), ("human", "<image>"), ("gpt", "no")]
    turns = [{"from": role, "value": text} for role, text in turns]
    sample = {"id": "x", "image": ["a.png", "never-read.png"], "conversations": turns}
    (tmp_path / "data.json").write_text(json.dumps([sample]))
    encode = TextEncoder(get_template("plain"), tokenizer, P, max_length=20, image_position="as_is")
    batches = make_batches(LlavaJson(tmp_path / "data.json", tmp_path), encode, 1, 1)
    batch = batches[0]
    assert batches.layout.image_slots == 1
    assert (batch["image_feature_index"] >= 0).sum() == P
    assert (batch["images"][0, 0] == [255, 0, 0]).all()


def sample_row(length, images, token):
    """A row of its own for one sample: its images first, then text of one token."""
    index = np.concatenate([np.arange(images * P), np.full(length - images * P, -1)])
    tokens = np.where(index < 0, token, 0)
    return Segment(tokens, np.where(index < 0, token, -100), index, images, images)


def test_several_samples_in_a_row():
    layout = Layout(2, 2, 24, image_slots=4, label_slots=48, image_tokens=P, image_size=1)

    def picture(value):
        return np.full((1, 1, 1, 3), value, np.uint8)

    first = build_row([(sample_row(6, 1, 5), [picture(1)]), (sample_row(3, 0, 6), [])], layout)
    second = build_row(
        [
            (sample_row(2, 0, 7), []),
            (sample_row(9, 2, 8), [picture(2), picture(3)]),
            (sample_row(5, 1, 9), [picture(4)]),
        ],
        layout,
    )
    batch = collate([first, second], layout)
    assert batch["segment_ids"][0].tolist() == [1] * 6 + [2] * 3 + [0] * 15
    assert batch["segment_ids"][1].tolist() == [1] * 2 + [2] * 9 + [3] * 5 + [0] * 8
    assert batch["positions"][1].tolist() == [*range(2), *range(9), *range(5), *[0] * 8]
    found = [(set(tokens[tokens > 0]), pictures[:, 0, 0, 0].tolist()) for tokens, _, pictures in parts(batch, 2)]
    assert found == [({5}, [1]), ({6}, []), ({7}, []), ({8}, [2, 3]), ({9}, [4])]


def test_rows_and_groups_that_do_not_fit_are_errors():
    layout = Layout(2, 2, 8, image_slots=1, label_slots=8, image_tokens=P, image_size=1)
    pictures = np.zeros((1, 1, 1, 3), np.uint8)
    with pytest.raises(ValueError, match="take 10 positions, it has 8"):
        build_row([(sample_row(5, 0, 1), []), (sample_row(5, 0, 1), [])], layout)
    row = build_row([(sample_row(5, 1, 1), [pictures])], layout)
    with pytest.raises(ValueError, match="1 slots"):
        collate([row, row], layout)


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("name", ["../secret.png", "/dev/zero", "pipe.png", "zeros.png"])
def test_images_outside_the_folder_and_what_is_no_file(tmp_path, encode, name, workers):
    """They are faults with the id of the sample, as those that are missing."""
    (tmp_path / "images").mkdir()
    tiny.add_irregular(tmp_path / "images")
    (tmp_path / "data.json").write_text(json.dumps([record(0, []), record(1, [name])]))
    batches = make_batches(LlavaJson(tmp_path / "data.json", tmp_path / "images"), encode, 2, 2)
    with pytest.raises(UserError, match="sample s1: image ") as caught:
        batches[0]
    skipping = Batches(
        EncodedSource(batches.encoded.source, encode, skip_bad=True), DECODE, batches.order, batches.layout
    )
    (found,) = [read.bad for read in skipping.iterate(0, 1, workers)]
    assert [(one.id, one.reason) for one in found] == [("s1", str(caught.value))]


def test_a_run_reads_absolute_names_where_its_config_says_so(tmp_path):
    name = str(tmp_path / "a.png")
    Image.new("RGB", (4, 4)).save(name)
    (tmp_path / "data.json").write_text(json.dumps([record(0, [name])]))
    config = get_config()
    config.data.update({"json": str(tmp_path / "data.json"), "images": str(tmp_path)})
    with pytest.raises(UserError, match="image .*data.allow_absolute_images"):
        open_data(config.data).read_images(0, [name])
    config.data.allow_absolute_images = True
    assert open_data(config.data).read_images(0, [name]) == [(tmp_path / "a.png").read_bytes()]


@pytest.fixture(scope="module")
def tiled(tokenizer):
    """Encoder and decoder of AnyRes, with tiles of 6 pixels and 4 features."""
    tiling = Tiling(AnyRes(several="base"), SIZE, 2, MEAN)
    encode = TextEncoder(get_template("plain"), tokenizer, image_tokens=P, max_length=LENGTH, tiling=tiling)
    return encode, ImageDecoder(SIZE, "anyres", MEAN, tiling=tiling)


def test_tiles_and_newlines_of_a_batch(source, tiled):
    """Each sample has the features of its images' sizes, of the tiles that are in the slots of its group."""
    encode, decode = tiled
    encoded = EncodedSource(source, encode)
    lengths = measure(encoded)
    order = Order(np.arange(len(source)), 4, 0)
    sizes = {"max_length": LENGTH, "image_tokens": P, "image_size": SIZE}
    layout = plan_layout([(order, order.epoch_steps(0))], lengths, rows_per_group=2, **sizes)
    batches, seen = Batches(encoded, decode, order, layout), 0
    for step in range(order.epoch_steps(0)):
        batch = batches[step]
        for row, (index,) in enumerate(filter(None, order.rows(step))):
            sample = source[index]
            images = [Image.open(source.images / name) for name in sample.images]
            several, seen = len(images) > 1, seen + 1
            features = [encode.tiling.features(Size(*image.size), several) for image in images]
            tiles = [tile for image in images for tile in encode.tiling.tiles(image, several)]
            found = batch["image_feature_index"][row]
            found = found[found != TEXT]
            expected = joined(features, P)
            np.testing.assert_array_equal(found == NEWLINE, expected == NEWLINE)
            slots = batch["images"][row // 2]
            for position, wanted in zip(found[found >= 0], expected[expected >= 0], strict=True):
                assert position % P == wanted % P
                np.testing.assert_array_equal(slots[position // P], tiles[wanted // P])
            assert lengths.images[index] == len(images) and lengths.tiles[index] == len(tiles) == sum(
                image.tiles for image in features
            )
    assert seen == len(source)


def test_sizes_are_those_of_upright_images(tmp_path, tiled):
    encode, decode = tiled
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 40, 3), np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.jpg", exif=exif)
    (tmp_path / "data.json").write_text(json.dumps([record(0, ["turned.jpg"])]))
    source = LlavaJson(tmp_path / "data.json", tmp_path)
    encoded = EncodedSource(source, encode)
    assert encoded.sizes(0, source[0]) == [(9, 40)]
    tall = encode.tiling.features(Size(9, 40), False)
    assert (encoded.segment(0, source[0]).image_feature_index != TEXT).sum() == len(tall.index)
    assert len(decode((tmp_path / "turned.jpg").read_bytes(), "turned.jpg")) == tall.tiles


def test_a_bad_image_keeps_the_places_of_its_size(tmp_path, tiled):
    """Its header is good, so that its positions are known."""
    encode, decode = tiled
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)).save(tmp_path / "0.png")
    data = (tmp_path / "0.png").read_bytes()
    (tmp_path / "0.png").write_bytes(data[: len(data) // 2])
    (tmp_path / "data.json").write_text(json.dumps([record(0, ["0.png"])]))
    encoded = EncodedSource(LlavaJson(tmp_path / "data.json", tmp_path), encode, skip_bad=True)
    lengths = measure(encoded)
    assert (lengths.images.tolist(), lengths.tiles.tolist()) == ([1], [5])
    order, sizes = Order(np.arange(1), 1, None), {"max_length": LENGTH, "image_tokens": P, "image_size": SIZE}
    layout = plan_layout([(order, 1)], lengths, rows_per_group=1, **sizes)
    ((batch, _, bad),) = Batches(encoded, decode, order, layout).iterate(0, 1)
    assert [one.id for one in bad] == ["s0"] and not batch["images"].any() and (batch["labels"] == -100).all()


def test_lengths_of_another_tiling_are_others(source, encode, tiled):
    names = {lengths_name(EncodedSource(source, each)) for each in (encode, tiled[0])}
    other = dataclasses.replace(tiled[0], tiling=Tiling(AnyRes(), SIZE, 2, MEAN))
    assert len(names | {lengths_name(EncodedSource(source, other))}) == 3
