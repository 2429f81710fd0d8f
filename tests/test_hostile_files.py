"""Every reader of files that others wrote, fed with valid ones that were changed: it reads them, or says why not. It
raises nothing else, and takes no memory that the file does not account for."""

import collections
import copy
import itertools
import json
import resource
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import tiny
from etils import epath
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from llava_jax.checkpoint.reading import open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert.adapter import open_adapter, with_adapter
from llava_jax.convert.export import export
from llava_jax.convert.export_original import export_original
from llava_jax.convert.found import Options
from llava_jax.convert.gguf_header import read_header
from llava_jax.convert.hf_config import read_llava, read_vision
from llava_jax.convert.hf_text import read_text
from llava_jax.convert.import_hf import find_llava
from llava_jax.convert.import_original import find_original
from llava_jax.convert.language_model import read_generation
from llava_jax.convert.outgoing import Tensor
from llava_jax.convert.tensors import open_directory
from llava_jax.convert.torch_save import save_torch
from llava_jax.data.sentencepiece_model import read_model
from llava_jax.data.sources import LlavaJson
from llava_jax.data.tokenization import load_tokenizer
from llava_jax.evaluate.answers import answer_of, read_answers
from llava_jax.evaluate.lines import read_lines
from llava_jax.plot import read_losses

MEMORY = 2**29  # bytes that the process may grow by over all changes of a file; all of these files are small


class Reader(NamedTuple):
    """What reads a directory, and the files there that are changed, by a pattern."""

    read: Callable[[Path], Any]
    files: str
    source: str = "llava"  # a directory that `valid` has
    changes: int = 60


def read_weights(directory: Path) -> None:
    for tensor in open_directory(directory).values():
        assert tensor.read().shape == tensor.shape


def read_llava_of_hf(directory: Path) -> None:
    find_llava(directory, Options())


def read_original(directory: Path) -> None:
    find_original(directory, None, None, Options())


def read_tokenizer(directory: Path) -> None:
    load_tokenizer(directory / "tokenizer").encode("a <image> b")


def read_samples(directory: Path) -> None:
    for file in directory.glob("data.*"):
        list(LlavaJson(file))


def read_evaluation(directory: Path) -> None:
    for file in directory.glob("answers.*"):
        read_answers(file)
    for line in read_lines(directory / "answers.jsonl"):
        answer_of(line)


READERS = {
    "config.json of transformers": Reader(read_llava_of_hf, "*config.json", changes=25),
    "config.json of the original": Reader(
        lambda d: find_original(d, None, None, Options()), "config.json", "original", 15
    ),
    "generation_config.json": Reader(read_generation, "generation_config.json"),
    "safetensors": Reader(read_weights, "model.safetensors", "weights"),
    "index": Reader(read_weights, "*.index.json", "shards"),
    ".bin": Reader(read_weights, "pytorch_model.bin", "torch"),
    "adapter": Reader(
        lambda d: with_adapter(open_directory(d.parent / "weights"), open_adapter(d)), "adapter_*", "adapter"
    ),
    "llava.json": Reader(lambda d: open_checkpoint(d).load(), "llava.json", "checkpoint", 15),
    "arrays": Reader(lambda d: open_checkpoint(d).load(), "params/**/*.json", "checkpoint", 8),
    "tokenizer": Reader(
        lambda d: load_tokenizer(d / "tokenizer").encode("a <image> b"), "tokenizer/*", "checkpoint", 20
    ),
    "SentencePiece": Reader(lambda d: read_model(d / "tokenizer.model"), "tokenizer.model", "pieces"),
    "GGUF": Reader(lambda d: read_header(d / "model.gguf"), "model.gguf", "gguf"),
    "samples": Reader(read_samples, "data.*", "data"),
    "answers": Reader(read_evaluation, "answers.*", "data"),
    "metrics": Reader(lambda d: read_losses(epath.Path(d)), "metrics.jsonl", "data"),
}


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> dict[str, Path]:
    """A directory for each kind of files, all of them in one."""
    root = tmp_path_factory.mktemp("valid")
    checkpoint = tiny.checkpoint(root)
    export(checkpoint, root / "llava")
    export_original(checkpoint, root / "original", tower="openai/clip-vit-large-patch14")
    values = {"a.weight": np.ones((6, 4), np.float32), "b": np.arange(3, dtype=np.float16)}
    for name in ("weights", "shards", "torch", "adapter", "pieces", "gguf", "data"):
        (root / name).mkdir()
    save_file(values, root / "weights/model.safetensors")
    for name, value in values.items():
        save_file({name: value}, root / f"shards/{name}.safetensors")
    index = {"metadata": {"total_size": 102}, "weight_map": {name: f"{name}.safetensors" for name in values}}
    (root / "shards/model.safetensors.index.json").write_text(json.dumps(index))
    tensors = [Tensor(name, value.shape, value.dtype, lambda value=value: value) for name, value in values.items()]
    save_torch(root / "torch/pytorch_model.bin", tensors)
    lora = {"base_model.model.a.lora_A.weight": np.ones((2, 4), np.float32),
            "base_model.model.a.lora_B.weight": np.ones((6, 2), np.float32)}  # fmt: skip
    save_file(lora, root / "adapter/adapter_model.safetensors")
    adapter = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "rank_pattern": {"b": 3}, "alpha_pattern": {"b": 3},
               "modules_to_save": [], "use_rslora": False, "bias": "none"}  # fmt: skip
    (root / "adapter/adapter_config.json").write_text(json.dumps(adapter))
    (root / "pieces/tokenizer.model").write_bytes(sentencepiece_model())
    (root / "gguf/model.gguf").write_bytes(gguf())
    write_data(root / "data")
    return {path.name: path for path in root.iterdir()} | {"checkpoint": checkpoint}


def sentencepiece_model() -> bytes:
    from sentencepiece.sentencepiece_model_pb2 import ModelProto

    model = ModelProto()
    for i, piece in enumerate(["<unk>", "<s>", "</s>", "\u2581", "a", "\u2581a"]):
        model.pieces.add(piece=piece, score=-i, type=2 if i == 0 else 3 if i < 3 else 1)
    return model.SerializeToString()


def gguf() -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value)) + value.encode()

    entries = [
        text("general.architecture") + struct.pack("<I", 8) + text("llama"),
        text("llama.block_count") + struct.pack("<II", 4, 2),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", 9, 8, 2) + text("a") + text("b"),
        text("tokenizer.ggml.scores") + struct.pack("<IIQ2f", 9, 6, 2, 0.5, 1.5),
    ]
    tensors = [text("output.weight") + struct.pack("<IQQIQ", 2, 4, 2, 0, 0)]
    head = struct.pack("<4sIQQ", b"GGUF", 3, len(tensors), len(entries))
    return head + b"".join(entries + tensors) + bytes(64)


def write_data(directory: Path) -> None:
    samples = [
        {"id": f"s{i}", "image": f"a/{i}.png", "conversations": [{"from": "human", "value": "<image>\nWhat?"},
                                                                 {"from": "gpt", "value": "é " * i}]}
        for i in range(3)
    ]  # fmt: skip
    (directory / "data.json").write_text(json.dumps(samples, indent=1))
    (directory / "data.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in samples))
    answers = [{"question_id": i, "text": f"answer {i}", "metadata": {}, "answer_id": "x"} for i in range(3)]
    (directory / "answers.jsonl").write_text("".join(json.dumps(answer) + "\n" for answer in answers))
    (directory / "answers.json").write_text(json.dumps({str(i): "yes" for i in range(3)}))
    lines = [{"step": i, "loss": 1.5 / i, "validation_loss": 1.0} for i in range(1, 4)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


HOSTILE = [
    None, True, False, 0, -1, 1, 3, 2**31, 10**9, 10**30, -(10**18), 0.5, -0.0, 1e308, float("nan"), float("inf"), "",
    "a", "../x", "/dev/zero", "gs://nowhere/x",
    "a\0b", "\x1b[31m", "\u202e", "\ud800", "x" * 2000, [], {}, [[]], [1, "a"],
    {"a": None}, {"a": {"b": []}}, [0.5, 0.5, 0.5], "1e9", "llama", [float("nan")] * 3,
]  # fmt: skip


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every container within a JSON value and a key of it."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return list(itertools.chain.from_iterable([(value, key), *places(inner)] for key, inner in items))


def change_json(data: st.DataObject, text: bytes) -> bytes:
    """One to three values replaced, removed, doubled or nested."""
    lines = text.decode().splitlines() if text.count(b"\n{") else [text.decode()]
    line = data.draw(st.integers(0, len(lines) - 1))
    value = copy.deepcopy(json.loads(lines[line]))
    for _ in range(data.draw(st.integers(1, 3))):
        found = places(value)
        if not found:
            break
        # By their depth, so that a vocabulary of thousands is not all that is changed.
        by_depth = collections.defaultdict(list)
        for holder, key in found:
            by_depth[len(places(holder)) > 50].append((holder, key))
        holder, key = data.draw(st.sampled_from(by_depth[data.draw(st.sampled_from(sorted(by_depth)))]))
        kind = data.draw(st.sampled_from(["replace"] * 6 + ["remove", "rename", "nest"]))
        if kind == "replace":
            holder[key] = copy.deepcopy(data.draw(st.sampled_from(HOSTILE)))
        elif kind == "remove":
            holder.pop(key)
        elif kind == "rename" and isinstance(holder, dict):
            holder[f"{key}x"] = holder.pop(key)
        else:
            holder[key] = [holder[key]]
    lines[line] = json.dumps(value)
    return "\n".join(lines).encode()


def change_text(data: st.DataObject, text: bytes) -> bytes:
    """What no JSON library writes."""
    kind = data.draw(st.sampled_from(["deep", "digits", "utf-16", "twice", "line"]))
    decoded = text.decode(errors="replace")
    match kind:
        case "deep":
            return decoded.replace(":", ":" + "[" * data.draw(st.sampled_from([50, 101, 100_000])), 1).encode()
        case "digits":
            return decoded.replace(":", ":" + "9" * data.draw(st.sampled_from([30, 301, 5000])) + ",", 1).encode()
        case "utf-16":
            return decoded.encode(data.draw(st.sampled_from(["utf-16", "utf-16-be", "utf-32"])))
        case "twice":
            return text + text
    return text.replace(b"\n", b"\r", data.draw(st.integers(1, 3)))


def change_bytes(data: st.DataObject, content: bytes) -> bytes:
    """Bits flipped, cut off, spliced or repeated."""
    at = data.draw(st.integers(0, len(content) - 1) | st.integers(0, min(300, len(content) - 1)))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert", "splice", "ones"]))
    match kind:
        case "flip":
            return content[:at] + bytes([content[at] ^ (1 << data.draw(st.integers(0, 7)))]) + content[at + 1 :]
        case "cut":
            return content[:at]
        case "insert":
            return content[:at] + data.draw(st.binary(min_size=1, max_size=9)) + content[at:]
        case "splice":
            other = data.draw(st.integers(0, len(content) - 1))
            return content[:at] + content[other : other + data.draw(st.integers(1, 200))] + content[at:]
    width = data.draw(st.sampled_from([1, 4, 8]))
    return content[:at] + b"\xff" * width + content[at + width :]


@pytest.mark.parametrize("name", READERS)
def test_a_changed_file_is_read_or_explained(name, valid, tmp_path):
    reader = READERS[name]
    good = valid[reader.source]
    reader.read(good)
    files = sorted(file.relative_to(good) for file in good.glob(reader.files) if file.is_file())
    assert files
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    counter = itertools.count()
    shutil.copytree(valid["weights"], tmp_path / "weights")  # which an adapter adapts

    @settings(max_examples=reader.changes, deadline=None, suppress_health_check=list(HealthCheck))
    @given(data=st.data())
    def run(data):
        file = data.draw(st.sampled_from(files))
        content = (good / file).read_bytes()
        changes = [change_bytes]
        if file.suffix in (".json", ".jsonl"):
            changes += [change_json, change_json, change_json, change_text]
        changed = data.draw(st.sampled_from(changes))(data, content)
        directory = tmp_path / f"{reader.source}-{next(counter)}"
        shutil.copytree(good, directory)
        (directory / file).write_bytes(changed)
        try:
            reader.read(directory)
        except UserError as error:
            assert str(error).strip()
        finally:
            shutil.rmtree(directory)

    run()
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 < MEMORY


CONFIGS = {
    "llama": (read_text, {"model_type": "llama", "rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama3": (read_text, {"model_type": "llama", "rope_parameters": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 5e5}}),
    "mistral": (read_text, {"model_type": "mistral", "sliding_window": 4096, "head_dim": 128}),
    "qwen2": (read_text, {"model_type": "qwen2", "layer_types": ["full_attention"] * 2, "tie_word_embeddings": True}),
    "clip": (read_vision, {"model_type": "clip", "vision_config": {"hidden_size": 64, "num_attention_heads": 4},
                           "vision_config_dict": {"image_size": 32}}),
    "siglip": (read_vision, {"model_type": "siglip_vision_model", "hidden_size": 64, "num_attention_heads": 4}),
    "llava": (read_llava, {"model_type": "llava", "vision_config": {"model_type": "clip_vision_model"},
                           "text_config": {"vocab_size": 32064}, "vision_feature_layer": -2}),
}  # fmt: skip
FIELDS = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
          "head_dim", "vocab_size", "rms_norm_eps", "layer_norm_eps", "rope_theta", "max_position_embeddings",
          "sliding_window", "image_size", "patch_size", "projection_dim", "hidden_act", "layer_types", "rope_scaling",
          "text_config", "vision_config", "vision_feature_layer", "image_token_index", "tie_word_embeddings",
          "quantization_config", "rope_parameters", "image_position", "mm_use_im_start_end"]  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
@given(data=st.data())
def test_a_changed_configuration_is_read_or_explained(family, data):
    read, config = CONFIGS[family]
    read(config, "F")
    changed = json.loads(change_json(data, json.dumps(config).encode()))
    values = HOSTILE + [copy.deepcopy(value) for value in config.values()]
    changed |= data.draw(st.dictionaries(st.sampled_from(FIELDS), st.sampled_from(values), max_size=3))
    try:
        read(changed, "F")
    except UserError as error:
        assert str(error).startswith("F") and len(str(error)) < 1000


SINGLE = {
    "num_hidden_layers": [0, -1, 10**9, True, "32", 1.5],
    "hidden_size": [0, -64, 10**12, 100, [4096]],
    "num_attention_heads": [0, -1, 7],
    "num_key_value_heads": [0, 5, -32],
    "head_dim": [0, -128, 127, 10**6],
    "vocab_size": [0, -1, 10**12],
    "rms_norm_eps": [float("nan"), -1e-6, float("inf"), 5, "1e-6"],
    "rope_theta": [0, -1.0, float("nan"), 10**200, "10000"],
    "max_position_embeddings": [0, -1, 10**12],
}


@pytest.mark.parametrize("field", SINGLE)
def test_each_field_of_a_decoder_is_named(field):
    for value in SINGLE[field]:
        with pytest.raises(UserError, match=f"F/config.json.*{field}"):
            read_text({"model_type": "llama", field: value}, "F/config.json")


def test_a_gguf_file_describes_no_more_than_it_holds(tmp_path):
    file, data = tmp_path / "model.gguf", gguf()
    file.write_bytes(data)
    assert read_header(file).numbers == 8
    for old, new, message in [
        (struct.pack("<II", 4, 2), struct.pack("<II", 4, 10**9), "describes 1000000000 layers"),
        (struct.pack("<QQ", 4, 2), struct.pack("<QQ", 2**40, 2**40), "numbers, more than"),
        (struct.pack("<IIQ", 9, 6, 2), struct.pack("<IIQ", 9, 6, 2**60), "has 1152921504606846976 items"),
        (struct.pack("<IIQ", 9, 6, 2), struct.pack("<IIQ", 9, 9, 2), "a value of type 9"),
        (struct.pack("<QQ", 1, 4), struct.pack("<QQ", 2**60, 4), "1152921504606846976 tensors"),
        (struct.pack("<Q", 5) + b"llama", struct.pack("<Q", 2**50) + b"llama", "a text of"),
    ]:
        file.write_bytes(data.replace(old, new))
        with pytest.raises(UserError, match=message):
            read_header(file)
