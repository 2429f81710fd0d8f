"""What the web page does when something is asked: the engine answers, and the page shows it as it comes."""

import contextlib
import html
import random
from collections.abc import AsyncIterator, Sequence
from typing import Any

import anyio
import gradio as gr

from llava_jax.cli import UserError
from llava_jax.generate import Request, Sampling
from llava_jax.serve.answers import Answers
from llava_jax.serve.engine import Engine, EngineError
from llava_jax.serve.errors import ApiError
from llava_jax.serve.messages import Message, all_files, answer, answered, files_of, question, text_of, to_request
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.pictures import Reader
from llava_jax.serve.turns import Marks

# The buttons of the text box: for sending a message, and for stopping an answer.
READY = {"submit_btn": True, "stop_btn": False}
ANSWERING = {"submit_btn": False, "stop_btn": True}

Shown = tuple[Any, list[Message]]  # what becomes of the text box and of the conversation


class Talk:
    """Listeners of the page: each yields what to show. Closed early, as the stop button does, they free the engine.

    Args:
      engine: what answers.
      metrics: what is told of the answers.
      reader: of pictures.
      examples: the questions that the page offers.
    """

    def __init__(self, engine: Engine, metrics: Metrics, reader: Reader, examples: Sequence[dict[str, Any]]):
        self._engine, self._metrics, self._reader, self._examples = engine, metrics, reader, examples
        self._marks = Marks(engine.tokenizer, engine.template)

    async def ask(
        self, message: dict[str, Any], history: list[Message], temperature: float, top_p: float, longest: int
    ) -> AsyncIterator[Shown]:
        """What was typed: `text` and `files`."""
        if message["text"].strip() or message["files"]:
            asked = question(self._marks.disarm(message["text"]), message["files"])
            async for shown in self._show(answered(history), asked, temperature, top_p, longest):
                yield shown

    async def retry(
        self, history: list[Message], event: gr.RetryData, temperature: float, top_p: float, longest: int
    ) -> AsyncIterator[Shown]:
        """A question of the conversation, once more."""
        async for shown in self._show(history[: event.index], history[event.index], temperature, top_p, longest):
            yield shown

    async def example(
        self, event: gr.SelectData, temperature: float, top_p: float, longest: int
    ) -> AsyncIterator[Shown]:
        """The browser's word is taken for the example's number only, not for the files in it."""
        example = self._examples[event.index]
        async for shown in self._show([], question(example["text"], example["files"]), temperature, top_p, longest):
            yield shown

    async def _show(
        self, history: list[Message], asked: Message, temperature: float, top_p: float, longest: int
    ) -> AsyncIterator[Shown]:
        """What cannot be answered goes back to the text box, with a word on why."""
        conversation = [*history, asked]
        yield gr.MultimodalTextbox(value=None, **ANSWERING), conversation
        try:
            sampling = Sampling(temperature, top_p, seed=random.getrandbits(32), max_new_tokens=int(longest))
            async with contextlib.aclosing(self._texts(conversation, sampling)) as texts:
                async for text in texts:
                    yield gr.skip(), [*conversation, answer(self._marks.disarm(text))]
        except (ApiError, UserError, EngineError) as error:
            reason = error.detail if isinstance(error, ApiError) else str(error)
            gr.Warning(html.escape(reason), title="No answer")
            yield {"text": text_of(asked), "files": files_of(asked)}, history

    async def _texts(self, conversation: list[Message], sampling: Sampling) -> AsyncIterator[str]:
        """The answer as far as it is known, each time that more of it is."""
        if not self._engine.ready:
            raise UserError("the server is warming up or shutting down: try again in a minute")
        request = to_request(conversation, await self._reader.read_files(all_files(conversation)))
        sampling = await anyio.to_thread.run_sync(self._fit, request, sampling)
        answers, text = Answers(self._engine, self._metrics, request, [sampling]), ""
        try:
            await answers.submit()
            yield text
            async for _, piece in (news async for news in answers.pieces() if news is not None):
                if piece is not None and piece.text:
                    text += piece.text
                    yield text
            if answers.answers[0].finish_reason == "length":
                gr.Info(f"The answer was cut at {sampling.max_new_tokens} tokens.")
        finally:
            answers.cancel()

    def _fit(self, request: Request, sampling: Sampling) -> Sampling:
        """An answer may be as long as the context has room for, if that is less than what was asked for."""
        room = self._engine.room(request)
        return Sampling(**vars(sampling) | {"max_new_tokens": max(1, min(sampling.max_new_tokens, room))})
