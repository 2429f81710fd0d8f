"""Compares a checkpoint with a directory of transformers: configuration, tensors and, if torch is installed, logits,
ids and answers.

Tensors are compared one by one in the types of the directory, bit for bit. Logits, ids and answers need both models in
float32 at once; if memory does not suffice, both get as many of the decoder's first layers as fit.
"""

import dataclasses
import functools
import importlib.util
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from llava_jax.checkpoint.merged import merged
from llava_jax.checkpoint.reading import Checkpoint, open_checkpoint
from llava_jax.cli import UserError, track
from llava_jax.convert.found import Found, Options
from llava_jax.convert.hf_config import CLASS
from llava_jax.convert.import_hf import find_llava
from llava_jax.convert.import_original import is_original
from llava_jax.convert.names import entries_of
from llava_jax.convert.outgoing import cast, read_tensor
from llava_jax.convert.stored_tensor import read_ahead
from llava_jax.data.chat_template import render_chats
from llava_jax.data.features import TEXT
from llava_jax.data.templates import IMAGE_TOKEN
from llava_jax.data.tokenizer_files import read_tokenizer_files
from llava_jax.files.reading import read_object
from llava_jax.inference.generate import Generator
from llava_jax.inference.prompts import Prompt, PromptEncoder
from llava_jax.inference.requests import GREEDY, Request, Sampling
from llava_jax.models.config import LlavaConfig
from llava_jax.models.hf_names import Entry
from llava_jax.models.llava import Params, build

_STACKED = "llm.layers."
SHOWN = 5  # differing tensors in a message
TOLERANCE = 1e-4  # of the largest logit
PROMPT, ANSWER = 500, 16  # tokens: short prompts would not show wrong positions
IMAGE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (61, 90, 3), np.uint8))
QUESTIONS = ("What is shown here?", "Describe the image.\nBe brief: one sentence, two at most.", "C'est quoi, ça? 🙂")


class Finding(NamedTuple):
    """One line of the report; `equal` is None if nothing was compared, or if a difference is not a failure."""

    what: str
    equal: bool | None
    detail: str

    def __str__(self) -> str:
        return f"{self.what:<11}{ {True: 'equal', False: 'DIFFER', None: 'note'}[self.equal]:<7} {self.detail}"


def verify(checkpoint_path: str, directory: str) -> Iterator[Finding]:
    """Yields one finding after the other. Raises UserError if one of the two models is not complete."""
    checkpoint = merged(open_checkpoint(checkpoint_path))
    checkpoint.check()
    hf = Path(directory)
    if is_original(read_object(hf / "config.json")):
        raise UserError(f"{hf}: a LLaVA in the original's layout; only one of transformers can be verified")
    found = find_llava(hf, Options())
    yield compare_config(checkpoint, found)
    yield compare_tensors(checkpoint, found)
    layers, missing = _layers_in_memory(checkpoint), "logits, ids and answers were not compared"
    if importlib.util.find_spec("torch") is None:
        yield Finding("computed", None, f"{missing}: torch is not installed (pip install 'llava_jax[torch-import]')")
    elif layers == 0:
        missing += ": the memory does not hold both models with a single layer in float32"
        yield Finding("computed", None, missing)
    else:
        if layers < checkpoint.config.text.num_layers:
            yield Finding("computed", None, f"with the first {layers} layers: memory holds no more of both models")
        yield from compare_computed(checkpoint, hf, layers)


def compare_config(checkpoint: Checkpoint, found: Found) -> Finding:
    """Compares all fields, except that an export may have more rows of the vocabulary."""
    ours, theirs = (_flat(config.to_dict()) for config in (checkpoint.config, found.config))
    rows = ours.pop("text.vocab_size"), theirs.pop("text.vocab_size")
    wrong = [
        f"{name} is {ours.get(name)}, there {theirs.get(name)}"
        for name in sorted(ours | theirs)
        if ours.get(name) != theirs.get(name)
    ]
    if rows[1] < rows[0]:
        wrong.append(f"the vocabulary has {rows[0]} rows, there {rows[1]}")
    added = f"; {rows[1] - rows[0]} more rows there, for tokens that have none" if rows[1] > rows[0] else ""
    return Finding("config", not wrong, "; ".join(wrong) or f"{len(ours)} fields{added}")


def compare_tensors(checkpoint: Checkpoint, found: Found) -> Finding:
    """Compares bit for bit, each tensor cast to its type in the directory."""
    places = [
        (part, entry, layer, leaf)
        for part, entries in entries_of(checkpoint.config).items()
        for entry in entries
        for layer, leaf in enumerate(entry.leaves())
    ]

    def difference(place: tuple[str, Entry, int, str]) -> float:
        part, entry, layer, leaf = place
        theirs = found.sources[part].get(part, leaf)
        ours = read_tensor(checkpoint, entry, layer)
        ours, theirs = cast(ours, theirs.dtype, entry.name), theirs[: len(ours)]  # an export may have more rows
        if ours.shape != theirs.shape:
            return np.inf
        bits = f"u{ours.itemsize}"
        if np.array_equal(ours.view(bits), theirs.view(bits)):
            return 0.0
        return float(np.abs(ours.astype(np.float32) - theirs.astype(np.float32)).max()) or np.finfo(np.float32).tiny

    reads = read_ahead(functools.partial(difference, place) for place in places)
    values = track(reads, "comparing tensors", len(places))
    apart = {leaf: value for (*_, leaf), value in zip(places, values, strict=True) if value != 0}  # NaN too
    worst = sorted(apart, key=apart.get, reverse=True)[:SHOWN]
    named = ", ".join(f"{leaf} by {apart[leaf]:.3g}" for leaf in worst)
    return Finding("tensors", not apart, f"{len(apart)} of {len(places)}: {named}" if apart else f"{len(places)}")


def _layers_in_memory(checkpoint: Checkpoint) -> int:
    """How many layers of the decoder fit into memory, in float32 in both models and with 50 % for activations."""
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    sizes = {name: 2.5 * 4 * leaf.size for name, leaf in checkpoint.abstract().items()}
    layers = checkpoint.config.text.num_layers
    stacked = sum(size for name, size in sizes.items() if name.startswith(_STACKED))
    return min(layers, max(0, int((free - sum(sizes.values()) + stacked) / (stacked / layers))))


def _first_layers(checkpoint: Checkpoint, layers: int, dtype: str) -> tuple[LlavaConfig, Params]:
    """The model with the first `layers` layers of the decoder, float32 rounded to `dtype`."""
    text = dataclasses.replace(checkpoint.config.text, num_layers=layers)
    params = checkpoint.load(name for name in checkpoint.abstract() if not name.startswith(_STACKED))
    for name in checkpoint.abstract():
        if name.startswith(_STACKED):
            params[name] = np.stack([checkpoint.read(name, layer) for layer in range(layers)])
    rounded = {name: jnp.asarray(value).astype(dtype).astype(jnp.float32) for name, value in params.items()}
    return dataclasses.replace(checkpoint.config, text=text), rounded


def _layer(name: str) -> str | None:
    """The layer of the decoder that a tensor of transformers belongs to."""
    match = re.search(r"language_model\..*layers\.(\d+)\.", name)
    return match and match[1]


def compare_computed(checkpoint: Checkpoint, directory: Path, layers: int) -> Iterator[Finding]:
    """Compares the logits for the same ids, the ids of the same prompts, and greedy answers."""
    import transformers
    from transformers import AutoConfig, AutoProcessor

    settings = _read(AutoConfig, directory)
    settings.text_config.num_hidden_layers = layers
    if getattr(settings.text_config, "layer_types", None):  # one per layer
        settings.text_config.layer_types = settings.text_config.layer_types[:layers]
    own = {"config": settings, "attn_implementation": "sdpa"}  # not the kernels that a config.json may name
    kind = getattr(transformers, f"{CLASS[checkpoint.config.tiling is not None]}ForConditionalGeneration")
    model, loading = _read(kind, directory, output_loading_info=True, **own)
    left_out = {str(layer) for layer in range(layers, checkpoint.config.text.num_layers)}
    loading["unexpected_keys"] = [name for name in loading["unexpected_keys"] if _layer(name) not in left_out]
    wrong = [f"{kind}: {', '.join(map(str, names))}" for kind, names in loading.items() if names]
    yield Finding("loading", not wrong, "; ".join(wrong) or "no key is missing or left over in transformers")
    dtype, model = str(model.dtype).removeprefix("torch."), model.float().eval()
    config, params = _first_layers(checkpoint, layers, dtype)
    generator = Generator(build(config, params), PromptEncoder.from_checkpoint(checkpoint))
    both = Both(generator, params, model, _read(AutoProcessor, directory))
    yield compare_logits(both)
    yield compare_ids(both)
    yield compare_answers(both)


def _read(kind: type, directory: Path, **options: Any) -> Any:
    """An object of transformers from a directory, without running code from it."""
    read_tokenizer_files(directory, directory)
    try:
        return kind.from_pretrained(directory, local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises any class for what it does not know
        raise UserError(f"{directory}: transformers cannot read it ({type(error).__name__}: {error})") from error


class Both(NamedTuple):
    """The same model here and in transformers, both in float32."""

    generator: Generator
    params: Params
    model: Any  # LlavaForConditionalGeneration or LlavaNextForConditionalGeneration
    processor: Any

    def request(self, question: str) -> Request:
        return Request([("user", f"{IMAGE_TOKEN}\n{question}")], [IMAGE])

    def inputs(self, prompt: Prompt) -> dict[str, Any]:
        """Our ids and pixels as the arguments of transformers' model."""
        import torch

        config, image = self.generator.config, prompt.image_feature_index != TEXT
        ids = np.where(image, self.model.config.image_token_id, prompt.tokens)
        pixels = (self.generator.prompts.read(IMAGE).tiles / 255 - config.image_mean) / config.image_std
        pixels = torch.from_numpy(pixels.astype(np.float32).transpose(0, 3, 1, 2).copy())
        sizes = {"image_sizes": torch.tensor([IMAGE.size[::-1]])} if config.tiling else {}
        return {
            "input_ids": torch.from_numpy(ids.astype(np.int64))[None],
            "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
            "pixel_values": pixels[None] if config.tiling else pixels,
            **sizes,
        }


def compare_logits(both: Both) -> Finding:
    """Compares the logits of all positions of a prompt with an image."""
    import torch

    generator = both.generator
    prompt = generator.prompts.encode(both.request("a b c d e f g h " * PROMPT))
    images_end = 1 + int(np.max(np.flatnonzero(prompt.image_feature_index != TEXT), initial=-1))
    longest = min(max(PROMPT, images_end + PROMPT // 2), generator.config.text.max_position_embeddings)
    prompt = prompt._replace(tokens=prompt.tokens[:longest], image_feature_index=prompt.image_feature_index[:longest])
    with torch.no_grad():
        theirs = both.model(**both.inputs(prompt)).logits[0].numpy()
    pixels = generator.prompts.read(IMAGE).tiles
    ours = np.asarray(_logits(generator.config, both.params, prompt.tokens, prompt.image_feature_index, pixels))
    theirs = theirs[:, : ours.shape[-1]]  # an export may have more rows
    apart, largest = float(np.abs(ours - theirs).max()), float(np.abs(theirs).max())
    detail = f"within {apart:.2g} of up to {largest:.3g}, {len(prompt.tokens)} tokens, float32"
    return Finding("logits", apart <= TOLERANCE * largest, detail)


@functools.partial(jax.jit, static_argnums=0)
def _logits(
    config: LlavaConfig, params: Params, tokens_T: jax.Array, index_T: jax.Array, tiles_NHWC: jax.Array
) -> jax.Array:
    model, length = build(config, params), len(tokens_T)
    batch = {
        "tokens": tokens_T[None],
        "image_feature_index": index_T[None],
        "images": tiles_NHWC[None],
        "positions": jnp.arange(length)[None],
        "segment_ids": jnp.ones((1, length), jnp.int32),
    }
    return model.llm.logits(model(batch))[0]


def compare_ids(both: Both) -> Finding:
    """Compares ids and pixels of prompts by the directory's chat template; different ones are not a failure."""
    wrong = []
    for question in QUESTIONS:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        (text,) = render_chats(
            [[{"role": "user", "content": content}]], both.processor.chat_template, both.processor.tokenizer
        )
        if text is None:
            wrong.append(f"chat template of {question!r}")
            continue
        theirs = both.processor(images=IMAGE, text=text, return_tensors="pt")
        ours = both.inputs(both.generator.prompts.encode(both.request(question)))
        wrong += [
            f"{name} of {question!r}"
            for name in ("input_ids", "pixel_values")
            if ours[name].shape != theirs[name].shape or not np.allclose(ours[name], theirs[name], rtol=0, atol=1e-6)
        ]
    if not wrong:
        return Finding("processor", True, f"ids and pixels of {len(QUESTIONS)} prompts")
    known = "(with SentencePiece it has one id fewer after an image, see docs/weights.md)"
    return Finding("processor", None, f"its {', '.join(wrong)} differ {known}")


def compare_answers(both: Both) -> Finding:
    """Compares greedy answers to equal ids."""
    import torch

    generator, wrong = both.generator, []
    for question in QUESTIONS:
        request = both.request(question)
        inputs = both.inputs(generator.prompts.encode(request))
        with torch.no_grad():
            output = both.model.generate(
                **inputs, max_new_tokens=ANSWER, do_sample=False, eos_token_id=generator.prompts.stop_ids
            )
        ids = output[0, inputs["input_ids"].shape[1] :].tolist()
        stream = generator.prompts.answer_stream(GREEDY)
        theirs = "".join([stream.push(token) for token in ids] + [stream.close()])
        (ours,) = generator.answer([request], Sampling(max_new_tokens=ANSWER))
        wrong += [f"{ours!r}, there {theirs!r}"] if ours != theirs else []
    return Finding("answers", not wrong, "; ".join(wrong) or f"{len(QUESTIONS)} of up to {ANSWER} tokens, greedy")


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for name, value in values.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat
