"""`/v1/chat/completions`: from a request's body to answers, in one response or as server-sent events."""

import asyncio
import contextlib
import functools
import secrets
import time
import uuid
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import Any, TypeVar

from fastapi import Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from openai.types import CompletionUsage
from openai.types.chat import ChatCompletion, ChatCompletionChunk, ChatCompletionMessage, ChatCompletionTokenLogprob
from openai.types.chat import chat_completion as complete
from openai.types.chat import chat_completion_chunk as streamed
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from starlette.types import Receive, Scope, Send

from llava_jax.inference import requests
from llava_jax.inference.answer import TokenLogprob
from llava_jax.inference.engine import Engine
from llava_jax.inference.prompts import PromptEncoder
from llava_jax.serve.answers import Answers, prepare
from llava_jax.serve.errors import ApiError
from llava_jax.serve.images import ImageReader
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.models import Models
from llava_jax.serve.schema import ChatRequest, TextPart
from llava_jax.serve.turns import Marks, parts_of, read_messages

MAX_LOGPROBS = 1_000_000  # of all answers together, alternatives included: about 200 bytes each
TEMPERATURE = 1.0  # OpenAI's default
Result = TypeVar("Result")


class Chat:
    """Answers chat completions."""

    def __init__(self, engine: Engine, models: Models, metrics: Metrics, reader: ImageReader):
        self._engine, self._models, self._metrics, self._reader = engine, models, metrics, reader
        self._logprobs = 0  # reserved by the current answers
        self._max_images = engine.context // engine.config.image_tokens
        self._max_characters = engine.context * max(map(len, engine.base.prompts.tokenizer.get_vocab()))

    async def respond(self, body: ChatRequest, http: Request) -> Response:
        """Raises `ApiError`. If the client disconnects, its answers are cancelled."""
        reserved = self._reserve_logprobs(body)
        try:
            answers = await _while_connected(http, self._submit(body))
            if answers is None:
                return Response(status_code=499)  # the client has disconnected
            body.messages.clear()  # up to 32 MB, not needed while the answer is generated
            http.scope["release_body"]()
            reply = _Reply(body, answers)
            if body.stream:
                return _EventStream(reply.events(), answers, reserved.pop_all())
            text = await _while_connected(http, reply.completion())
            return Response(text, media_type="application/json") if text else Response(status_code=499)
        finally:
            reserved.close()

    def _reserve_logprobs(self, body: ChatRequest) -> contextlib.ExitStack:
        """Reserves log-probabilities until it is closed. Raises `ApiError` where too many are reserved."""
        reserved = contextlib.ExitStack()
        if body.logprobs:
            n, alternatives = body.n or 1, body.top_logprobs or 0
            longest = min(body.max_completion_tokens or body.max_tokens or self._engine.context, self._engine.context)
            if (count := n * longest * (1 + alternatives)) > MAX_LOGPROBS:
                what = (
                    f"{n} answers of up to {longest} tokens with {alternatives} alternatives to each are more than "
                    f"{MAX_LOGPROBS} log-probabilities: lower n, max_tokens or top_logprobs"
                )
                raise ApiError(400, what, "invalid_value", "top_logprobs")
            if self._logprobs + count > MAX_LOGPROBS:
                raise ApiError(429, "too many log-probabilities at a time: try again", "queue_full", retry_after=5)
            self._logprobs += count
            reserved.callback(self._free_logprobs, count)
        return reserved

    def _free_logprobs(self, count: int) -> None:
        self._logprobs -= count

    async def _submit(self, body: ChatRequest) -> Answers:
        adapter = self._models.find(body.model)
        self._refuse_oversize(body)
        prompts = adapter.prompts
        interleaved = prompts.config.image_position == "as_is"
        turns, urls, begun = read_messages(body.messages, _marks(prompts), interleaved)
        images = await self._reader.read(urls, functools.partial(prompts.read, several=len(urls) > 1))
        prompt = await prepare(self._engine, requests.Request(turns, images, begun), adapter)
        longest = body.max_completion_tokens or body.max_tokens or max(1, self._engine.room(prompt))
        answers = Answers(self._engine, self._metrics, prompt, _samplings(body, longest))
        await answers.submit()
        return answers

    def _refuse_oversize(self, body: ChatRequest) -> None:
        """Raises `ApiError` for what never fits, before it is decoded, tokenized or queued."""
        n, parts = body.n or 1, [part for message in body.messages for _, part in parts_of(message)]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        images = len(parts) - len(texts)
        if n > (most := self._engine.capacity):
            what = f"n is {n}, but this server holds {most} answers at a time, those that wait included: lower it"
            raise ApiError(400, what, "invalid_value", "n")
        context = f"the context of {self._engine.context} tokens"
        if images > self._max_images:
            what = f"messages: {images} images, but {context} has room for {self._max_images} at most"
            raise ApiError(400, what, "too_many_images", "messages")
        if (characters := sum(map(len, texts))) > self._max_characters:
            what = f"messages: {characters} characters cannot fit into {context}"
            raise ApiError(400, what, "context_length_exceeded", "messages")


@functools.lru_cache(maxsize=32)
def _marks(prompts: PromptEncoder) -> Marks:
    return Marks(prompts.tokenizer, prompts.template)


def _samplings(body: ChatRequest, longest: int) -> list[requests.Sampling]:
    """One for each of the `n` answers. They differ by their seeds."""
    seed = secrets.randbits(32) if body.seed is None else body.seed
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    return [
        requests.Sampling(
            temperature=TEMPERATURE if body.temperature is None else body.temperature,
            top_p=1.0 if body.top_p is None else body.top_p,
            top_k=max(0, body.top_k or 0),
            seed=(seed + index) % 2**32,
            max_new_tokens=longest,
            stop=stop,
            logprobs=(body.top_logprobs or 0) if body.logprobs else None,
        )
        for index in range(body.n or 1)
    ]


class _Reply:
    """The response with `answers`: one object, or an event for each piece."""

    def __init__(self, body: ChatRequest, answers: Answers):
        self._answers = answers
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self._with_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        self._with_logprobs = bool(body.logprobs)

    async def completion(self) -> str:
        """A `ChatCompletion` as JSON. Log-probabilities become text as they arrive, which takes much less memory."""
        texts = ["" for _ in self._answers.answers]
        logprobs: list[list[str]] = [[] for _ in texts]
        try:
            async for event in self._answers.pieces():
                if event is not None and event[1] is not None:
                    index, piece = event
                    texts[index] += piece.text
                    tokens = map(_token_logprob, piece.token_logprobs)
                    logprobs[index] += [token.model_dump_json(exclude_unset=True) for token in tokens]
        finally:
            self._answers.cancel()
        choices = [
            complete.Choice(
                index=index,
                finish_reason=answer.finish_reason,
                message=ChatCompletionMessage(role="assistant", content=texts[index], refusal=None),
                logprobs=self._logprobs(complete.ChoiceLogprobs, []),
            )
            for index, answer in enumerate(self._answers.answers)
        ]
        completion = ChatCompletion(object="chat.completion", choices=choices, usage=self._usage(), **self._head)
        before, *after = completion.model_dump_json(exclude_unset=True).split(
            '"content":[]'
        )  # not in a string, where quotes are escaped
        filled = (f'"content":[{",".join(own)}]{rest}' for own, rest in zip(logprobs, after, strict=False))
        return before + "".join(filled)

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events: for each answer its role, text and finish reason; then the usage and `[DONE]`."""
        try:
            for index in range(len(self._answers.answers)):
                yield self._chunk(index, role="assistant", content="")
            async for event in self._answers.pieces():
                if event is None:
                    yield KEEPALIVE_COMMENT
                    continue
                index, piece = event
                if piece is None:
                    yield self._chunk(index, finish_reason=self._answers.answers[index].finish_reason)
                else:
                    yield self._chunk(index, piece.token_logprobs, content=piece.text)
            if self._with_usage:
                yield self._event([], usage=self._usage())
            yield format_sse_event(data_str="[DONE]")
        except ApiError as error:  # the status has been sent already
            yield format_sse_event(data_str=error.response().body.decode())

    def _chunk(
        self, index: int, logprobs: Sequence[TokenLogprob] = (), finish_reason: str | None = None, **delta: str
    ) -> bytes:
        choice = streamed.Choice(
            index=index,
            delta=streamed.ChoiceDelta(**delta),
            logprobs=self._logprobs(streamed.ChoiceLogprobs, logprobs) if logprobs else None,
            finish_reason=finish_reason,
        )
        return self._event([choice], **({"usage": None} if self._with_usage else {}))

    def _event(self, choices: list[streamed.Choice], **more: Any) -> bytes:
        chunk = ChatCompletionChunk(object="chat.completion.chunk", choices=choices, **self._head, **more)
        return format_sse_event(data_str=chunk.model_dump_json(exclude_unset=True))

    def _logprobs(self, kind: type[Result], tokens: Sequence[TokenLogprob]) -> Result | None:
        if not self._with_logprobs:
            return None
        return kind(content=[_token_logprob(token) for token in tokens], refusal=None)

    def _usage(self) -> CompletionUsage:
        answers = self._answers.answers
        prompt, completion = answers[0].prompt_tokens, sum(answer.completion_tokens for answer in answers)
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


def _token_logprob(token: TokenLogprob) -> ChatCompletionTokenLogprob:
    top = [TopLogprob(token=other.token, bytes=list(other.bytes), logprob=other.logprob) for other in token.top]
    return ChatCompletionTokenLogprob(
        token=token.token, bytes=list(token.bytes), logprob=token.logprob, top_logprobs=top
    )


class _EventStream(StreamingResponse):
    """Server-sent events. However the response ends, the answers are cancelled."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], answers: Answers, reserved: contextlib.ExitStack):
        # The second header keeps nginx from buffering the events.
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        self._answers, self._reserved = answers, reserved

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._answers.cancel()
            self._reserved.close()


async def _while_connected(http: Request, work: Coroutine[Any, Any, Result]) -> Result | None:
    """The result of `work`; None if the client disconnects first, which cancels the work."""
    task, left = asyncio.ensure_future(work), asyncio.ensure_future(_disconnected(http))
    try:
        await asyncio.wait((task, left), return_when=asyncio.FIRST_COMPLETED)
        return task.result() if task.done() else None
    finally:
        task.cancel()
        left.cancel()
        await asyncio.gather(task, left, return_exceptions=True)


async def _disconnected(http: Request) -> None:
    while (await http.receive())["type"] != "http.disconnect":
        pass
