"""The public API: models that are loaded and used. `llava_jax/__init__.py` lists all public names."""

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypedDict, Unpack, overload

import jax
import numpy as np
from PIL import Image

from llava_jax.checkpoint.reading import Checkpoint, is_checkpoint, open_checkpoint
from llava_jax.cli import UserError
from llava_jax.convert import hub
from llava_jax.convert.import_weights import ImportedModel, open_llava
from llava_jax.convert.served_adapter import read_for
from llava_jax.data.templates import IMAGE_TOKEN, choose_template
from llava_jax.data.transcript import marked
from llava_jax.inference.generate import Generator
from llava_jax.inference.requests import Request, Sampling

DTYPES = ("float32", "bfloat16")
MAX_NEW_TOKENS = 512  # of an answer, unless the context has less room or the caller says otherwise

ImageInput = Image.Image | np.ndarray | str | os.PathLike
"""An image: of PIL, an array uint8[H, W, 3], [H, W, 4] or [H, W] (gray), or the path of a file, local or gs://."""

Turn = tuple[str, str] | Mapping[str, str]
"""One turn of a conversation: `(role, text)` or `{"role": role, "content": text}`. The roles "user" and "assistant"
alternate, the user first; a turn of the role "system" may precede them. Each `<image>` is the place of an image."""

Prompt = str | Sequence[Turn]
"""A question, or a conversation whose last turn is the user's. Images that have no `<image>` in a question come before
its text; those of a conversation without any `<image>` come before its first question."""


Images = ImageInput | Sequence[ImageInput] | None
Known = dict[int, tuple[ImageInput, Image.Image]]  # the images that were made of arrays, and these, by their `id`


class SamplingOptions(TypedDict, total=False):
    """How an answer is sampled. Values out of range raise `UserError`.

    Attributes:
      max_new_tokens: tokens of an answer at most; by default 512, or what the context has room for.
      temperature: 0, the default, is greedy: the most likely token is taken.
      top_p: samples among the most likely tokens whose probabilities together reach it; 1 by default.
      top_k: samples among this many most likely tokens; 0, the default, is no limit.
      seed: equal seeds give equal answers to equal prompts; 0 by default.
      stop: strings that end the answer and are not part of it, besides the end mark of the template.
    """

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int
    stop: Sequence[str]


class Model:
    """A vision-language model that is ready to use. Make it with `llava_jax.load`.

    It is used from one thread at a time. Axes: N images, P patches an image, D width of the language model, V
    vocabulary.

    Attributes:
      config: sizes and kinds of the model's parts, a `LlavaConfig`.
      tokenizer: of the language model, as transformers loads it.
      adapters: the names of its adapters (LoRA), which answer instead of the model if their name is given.
    """

    def __init__(self, generator: Generator):
        self.config, self.tokenizer = generator.config, generator.prompts.tokenizer
        self.adapters = [adapter.name for adapter in generator.adapters.loaded()]
        self._generator = generator

    @overload
    def chat(
        self,
        prompt: Prompt,
        images: Sequence[ImageInput] = (),
        *,
        system: str | None = None,
        adapter: str | None = None,
        stream: Literal[False] = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str: ...

    @overload
    def chat(
        self,
        prompt: Prompt,
        images: Sequence[ImageInput] = (),
        *,
        system: str | None = None,
        adapter: str | None = None,
        stream: Literal[True],
        **sampling: Unpack[SamplingOptions],
    ) -> Iterator[str]: ...

    def chat(
        self,
        prompt: Prompt,
        images: Sequence[ImageInput] = (),
        *,
        system: str | None = None,
        adapter: str | None = None,
        stream: bool = False,
        **sampling: Unpack[SamplingOptions],
    ) -> str | Iterator[str]:
        """Answers a question, or the last turn of a conversation.

        ```python
        model.chat("What is this?", images=["cat.jpg"])
        model.chat([("user", "What is this?"), ("assistant", "A cat."), ("user", "Which color?")], ["cat.jpg"])
        for text in model.chat("Tell me a story.", stream=True, temperature=0.7):
            print(text, end="")
        ```

        Args:
          prompt: a question, or turns of a conversation; see `Prompt`.
          images: one for each `<image>`, in order; see `ImageInput`.
          system: the system prompt instead of the template's.
          adapter: the name of one of `adapters`, which answers; by default the model without any.
          stream: yields the parts of the answer as they are generated.
          **sampling: see `SamplingOptions`.

        Returns:
          The answer, or with `stream` an iterator over its parts.

        Raises:
          UserError: the prompt is malformed, has another number of `<image>` than images or is too long for the
            context, an image is missing or damaged, or there is no such adapter. With `stream` it is raised when the
            iteration begins.
        """
        generator, request = self._with(adapter), self._request(prompt, images, system)
        parts = generator.stream(request, _sampling(generator, request, sampling))
        return parts if stream else "".join(parts)

    def generate(
        self,
        prompts: Sequence[Prompt],
        images: Sequence[ImageInput | Sequence[ImageInput] | None] | None = None,
        *,
        adapter: str | None = None,
        batch_size: int = 16,
        **sampling: Unpack[SamplingOptions],
    ) -> list[str]:
        """Answers many prompts, `batch_size` at a time. No answer depends on the other prompts, up to rounding.

        Prompts of a batch that begin with the same image compute it once, so keep them next to each other.

        Args:
          prompts: see `Prompt`.
          images: for each prompt its images, an image or None; None for prompts without images.
          adapter: that answers all prompts; see `chat`.
          batch_size: prompts that are answered at a time.
          **sampling: see `SamplingOptions`.

        Returns:
          The answers, in the order of the prompts.

        Raises:
          UserError: as `chat` does, and if there are not as many `images` as `prompts`.
        """
        _check_batch_size(batch_size)
        if isinstance(prompts, str):
            raise UserError("prompts is one text: give a list of prompts, or use `chat`")
        if images is None:
            images = [None] * len(prompts)
        elif isinstance(images, Image.Image | str | os.PathLike):
            raise UserError("images is one image: give a list that has the image, or images, of each prompt")
        if len(images) != len(prompts):
            raise UserError(f"{len(prompts)} prompts, but images for {len(images)}: give None for a prompt without any")
        generator, known = self._with(adapter), {}
        requests = [self._request(prompt, own, known=known) for prompt, own in zip(prompts, images, strict=True)]
        samplings = [_sampling(generator, request, sampling) for request in requests]
        answers = [""] * len(prompts)
        for one in dict.fromkeys(samplings):  # most prompts have the same one
            chosen = [index for index, other in enumerate(samplings) if other == one]
            found = generator.answer([requests[index] for index in chosen], one, batch_size)
            for index, answer in zip(chosen, found, strict=True):
                answers[index] = answer
        return answers

    def encode_images(
        self, images: Sequence[ImageInput], *, adapter: str | None = None, batch_size: int = 16
    ) -> np.ndarray | list[np.ndarray]:
        """The image features that the language model sees, H_v = W g(X_v) of the paper (section 4.1).

        Args:
          images: see `ImageInput`.
          adapter: whose projector is used, if it has one; see `chat`.
          batch_size: images that are encoded at a time.

        Returns:
          float32[N, P, D]; of a model with AnyRes (LLaVA-1.6) a list of float32[L, D], whose L depends on the size of
          the image: the features of the base and of the tiles and the learned newlines, in the order in which they are
          in the prompt of one image.

        Raises:
          UserError: an image is missing, damaged or too thin for AnyRes, or there is no such adapter.
        """
        _check_batch_size(batch_size)
        generator = self._with(adapter)
        opened = _images(images, {})
        batches = [opened[start : start + batch_size] for start in range(0, len(opened), batch_size)]
        encoded = map(generator.encode_images, batches)
        if self.config.tiling:
            return list(itertools.chain.from_iterable(encoded))
        empty = np.zeros((0, self.config.image_tokens, self.config.text.hidden_size), np.float32)
        return np.concatenate([empty, *encoded])

    def logits(
        self, prompt: Prompt, answer: str = "", images: Sequence[ImageInput] = (), *, adapter: str | None = None
    ) -> np.ndarray:
        """The scores of the next token at each position of a prompt that is followed by (the beginning of) an answer.

        The positions are those of the template's text: the system prompt, the turns and the mark of the assistant's
        turn, in which each image takes P positions, and then the answer's tokens without an end mark. The last row
        scores what follows all of it.

        Args:
          prompt: see `Prompt`.
          answer: text that the assistant's turn begins with.
          images: see `chat`.
          adapter: see `chat`.

        Returns:
          float32[L, V], not normalized; L is the number of positions.

        Raises:
          UserError: as `chat` does.
        """
        return self._with(adapter).logits(self._request(prompt, images, answer=answer))

    def logprobs(
        self, prompt: Prompt, answer: str, images: Sequence[ImageInput] = (), *, adapter: str | None = None
    ) -> np.ndarray:
        """The log probability of each token of an answer, given the prompt and the tokens before it.

        Args:
          prompt: see `Prompt`.
          answer: its sum of log probabilities ranks it among other answers. Its end mark is not part of it.
          images: see `chat`.
          adapter: see `chat`.

        Returns:
          float32[A] of the answer's A tokens

        Raises:
          UserError: as `chat` does.
        """
        generator, request = self._with(adapter), self._request(prompt, images, answer=answer)
        encode = generator.prompts.encode
        asked = encode(Request(request.turns, request.images)).tokens
        tokens = encode(request).tokens
        common = tokens[: len(asked)] == asked[: len(tokens)]
        begin = len(common) if common.all() else int(common.argmin())  # a tokenizer may join the first token with `:`
        scores = jax.nn.log_softmax(generator.logits(request)[begin - 1 : -1])
        return np.asarray(scores)[np.arange(len(tokens) - begin), tokens[begin:]]

    def _request(
        self, prompt: Prompt, images: Images, system: str | None = None, answer: str = "", known: Known | None = None
    ) -> Request:
        opened = _images(images, {} if known is None else known)
        turns = [("user", prompt)] if isinstance(prompt, str) else [_turn(turn) for turn in prompt]
        if not turns or turns[-1][0] != "user":
            raise UserError(f"a prompt ends with the user's turn, not with {turns[-1:] or 'none at all'}")
        first = next(index for index, (role, _) in enumerate(turns) if role == "user")
        if len(turns) == 1 or not any(IMAGE_TOKEN in text for _, text in turns):
            turns[first] = ("user", marked(turns[first][1], len(opened)))
        if system is not None:
            turns = [("system", system), *turns]
        return Request(turns, opened, answer)

    def _with(self, adapter: str | None) -> Generator:
        return self._generator if adapter is None else self._generator.with_adapter(adapter)


def load(
    source: str | os.PathLike,
    *,
    template: str | None = None,
    dtype: str | None = None,
    quantize: str | None = None,
    mesh: Mapping[str, int] | None = None,
    devices: Sequence[jax.Device] = (),
    adapters: Mapping[str, str | os.PathLike] | None = None,
) -> Model:
    """Loads a model.

    ```python
    model = llava_jax.load("runs/finetune")
    model = llava_jax.load("llava-hf/llava-1.5-7b-hf", quantize="int8")
    model = llava_jax.load("llava-hf/llava-1.5-7b-hf", adapters={"mine": "runs/lora"})
    model.chat("What is this?", ["cat.jpg"], adapter="mine")
    ```

    A model of Hugging Face is converted as `llava convert import --llava` does, while it is read: nothing is written
    but what its Hub's client downloads to its own cache (`HF_HOME`).

    Args:
      source: a training workdir (its newest step is taken), one step of it, a checkpoint that `llava convert import`
        made, a directory with a LLaVA of Hugging Face, or a name on its Hub: `organisation/name` or
        `organisation/name@revision`. The first three may be on an object store (gs://).
      template: of conversations, instead of the model's own; see `llava_jax/data/templates.py`.
      dtype: of weights and computation, "float32" or "bfloat16"; by default float32 on CPUs and bfloat16 on other
        devices.
      quantize: "int8" stores the weights of the language model in eight bits.
      mesh: shards the parameters over devices, as `{"tensor": 4}`; axes are "data", "fsdp" and "tensor".
      devices: to use instead of the first one. Without a `mesh`, each layer is split over all of them.
      adapters: directories of adapters (LoRA) that were trained on this model, by name: of PEFT, or workdirs. The base
        is loaded once.

    Returns:
      The model, its weights on the devices.

    Raises:
      UserError: there is no such model, it is damaged or not supported, an adapter is for another one, or an option has
        no such value. The message is one line that says what to do.
    """
    if dtype not in (None, *DTYPES):
        raise UserError(f"dtype is {dtype!r}: choose {' or '.join(DTYPES)}")
    checkpoint = _open(os.path.expanduser(os.fspath(source)))
    chosen = choose_template(template, checkpoint.template)
    folders = {name: os.path.expanduser(os.fspath(folder)) for name, folder in (adapters or {}).items()}
    read = {name: read_for(folder, checkpoint, template) for name, folder in folders.items()}
    options = {"mesh": mesh, "quantize": quantize, "adapters": read}
    return Model(Generator.from_checkpoint(checkpoint, chosen, dtype, devices, **options))


def _open(source: str) -> Checkpoint | ImportedModel:
    """A checkpoint of ours, or a LLaVA of Hugging Face."""
    path = Path(source)
    is_directory = any((path / name).exists() for name in ("config.json", "adapter_config.json"))
    is_hf = is_directory or (not path.exists() and hub.is_name(source))
    return open_llava(source) if is_hf and not is_checkpoint(source) else open_checkpoint(source)


def _sampling(generator: Generator, request: Request, options: SamplingOptions) -> Sampling:
    stop = options.get("stop", ())
    options = {**options, "stop": (stop,) if isinstance(stop, str) else tuple(stop)}
    if "max_new_tokens" not in options:
        options["max_new_tokens"] = max(1, min(MAX_NEW_TOKENS, generator.room(request)))
    return Sampling(**options)


def _check_batch_size(batch_size: int) -> None:
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it has to be 1 or more")


def _turn(turn: Turn) -> tuple[str, str]:
    pair = (turn.get("role"), turn.get("content")) if isinstance(turn, Mapping) else tuple(turn)
    if len(pair) != 2 or not all(isinstance(part, str) for part in pair):
        raise UserError(f'a turn is (role, text) or {{"role": role, "content": text}}, not {turn!r:.200}')
    return pair


def _images(images: Images, known: Known) -> list[ImageInput]:
    """The images as the generator takes them. Those of an array that is `known` stay the same."""
    if images is None:
        return []
    if isinstance(images, Image.Image | str | os.PathLike) or (isinstance(images, np.ndarray) and images.ndim < 4):
        images = [images]
    return [_image(image, known) for image in images]


def _image(image: ImageInput, known: Known) -> ImageInput:
    if isinstance(image, str | os.PathLike):
        return os.path.expanduser(image)
    if isinstance(image, Image.Image):
        return image
    if id(image) not in known:
        array = np.asarray(image)
        if array.dtype != np.uint8 or array.ndim not in (2, 3) or array.ndim == 3 and array.shape[2] not in (3, 4):
            raise UserError(
                f"an image is {array.dtype}{list(array.shape)}: arrays are uint8[H, W, 3], [H, W, 4] or [H, W]"
            )
        known[id(image)] = image, Image.fromarray(array)  # both, since an id is that of an object only while it exists
    return known[id(image)][1]
