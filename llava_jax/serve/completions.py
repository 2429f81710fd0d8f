"""From the body of a request to the answers, which `replies` turns into the response."""

import asyncio
import contextlib
import dataclasses
import functools
import secrets
import threading
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

import anyio
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from llava_jax.cli import UserError
from llava_jax.inference import requests
from llava_jax.inference.adapters import Adapter
from llava_jax.inference.constraints import Constraint, Constraints
from llava_jax.inference.engine import Engine
from llava_jax.inference.prefix_cache import PreparedPrompt
from llava_jax.inference.prompts import PromptEncoder
from llava_jax.serve.answers import Answers, prepare
from llava_jax.serve.errors import ApiError
from llava_jax.serve.images import ImageReader
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.models import Models
from llava_jax.serve.replies import ChatReply, EventStream, Reply, TextReply
from llava_jax.serve.responses import ResponseRequest, as_chat, reply_to
from llava_jax.serve.schema import ChatRequest, Detokenize, Generation, TextPart, TextRequest, Tokenize
from llava_jax.serve.tools import Tools, tools_of
from llava_jax.serve.turns import Marks, parts_of, read_messages

MAX_LOGPROBS = 1_000_000  # of all answers together, alternatives included: about 200 bytes each
TEMPERATURE = 1.0  # OpenAI's default
Result = TypeVar("Result")


class Completions:
    """Answers requests; the public methods are the endpoints of these names. All methods raise `ApiError`."""

    def __init__(self, engine: Engine, models: Models, metrics: Metrics, reader: ImageReader):
        self._engine, self._models, self._metrics, self._reader = engine, models, metrics, reader
        self._logprobs = 0  # reserved by the current answers
        self._max_images = engine.context // engine.config.image_tokens
        self._max_characters = engine.context * max(map(len, engine.base.prompts.tokenizer.get_vocab()))
        self._compiling = anyio.CapacityLimiter(2)  # threads for constraints
        constraints = _constraints(engine.base.prompts, engine.config.text.vocab_size)
        threading.Thread(target=constraints.tokens, daemon=True).start()  # while the engine warms up

    async def chat_completions(self, body: ChatRequest, request: Request) -> Response:
        return await self._respond(body, request, self._submit_chat, ChatReply)

    async def completions(self, body: TextRequest, request: Request) -> Response:
        return await self._respond(body, request, self._submit_texts, TextReply)

    async def responses(self, body: ResponseRequest, request: Request) -> Response:
        return await self._respond(as_chat(body), request, self._submit_chat, reply_to(body))

    async def tokenize(self, body: Tokenize, request: Request) -> Response:
        adapter = self._models.find(body.model) if body.model is not None else self._engine.base
        if body.messages is not None:
            chat = ChatRequest(model="", messages=body.messages)
            self._refuse_oversize(chat)
            prompt = await self._prepare_chat(chat, adapter, tools_of(chat, adapter.prompts.template))
            if prompt.tiles:
                what = "messages: positions of images have no tokens: leave the images out"
                raise ApiError(400, what, "unsupported_parameter", "messages")
        else:
            self._refuse_long(len(body.prompt), "prompt")
            prompt = await prepare(self._engine, body.prompt, adapter, "prompt", body.add_special_tokens is not False)
        tokens = prompt.tokens.tolist()
        return JSONResponse({"count": len(tokens), "max_model_len": self._engine.context, "tokens": tokens})

    async def detokenize(self, body: Detokenize, request: Request) -> Response:
        adapter = self._models.find(body.model) if body.model is not None else self._engine.base
        prompt = await prepare(self._engine, body.tokens, adapter, "tokens")
        return JSONResponse({"prompt": adapter.prompts.tokenizer.decode(prompt.tokens.tolist())})

    async def _respond(
        self,
        body: Generation,
        http: Request,
        submit: Callable[[Any], Coroutine[Any, Any, Answers]],
        reply_of: Callable[[Any, Answers], Reply],
    ) -> Response:
        """If the client disconnects, its answers are cancelled."""
        reserved = self._reserve_logprobs(body)
        try:
            answers = await _while_connected(http, submit(body))
            if answers is None:
                return Response(status_code=499)  # the client has disconnected
            reply = reply_of(body, answers)
            body.drop_prompt()  # up to 32 MB, not needed while the answer is generated
            http.scope["release_body"]()
            if body.stream:
                return EventStream(reply.events(), answers, reserved.pop_all())
            text = await _while_connected(http, reply.completion())
            return Response(text, media_type="application/json") if text else Response(status_code=499)
        finally:
            reserved.close()

    def _reserve_logprobs(self, body: Generation) -> contextlib.ExitStack:
        """Reserves log-probabilities until it is closed. Raises `ApiError` where too many are reserved."""
        reserved = contextlib.ExitStack()
        if (alternatives := body.alternatives) is not None:
            n, longest = body.answers, min(body.limit or self._engine.context, self._engine.context)
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

    async def _submit_chat(self, body: ChatRequest) -> Answers:
        adapter = self._models.find(body.model)
        self._refuse_oversize(body)
        tools = tools_of(body, adapter.prompts.template)
        constraint = await self._constraint(body, adapter.prompts, tools if body.calls_tools else None)
        prompt = await self._prepare_chat(body, adapter, tools)
        longest = body.limit or max(1, self._engine.room(prompt))
        return await self._submit([(prompt, sampling) for sampling in samplings(body, longest, constraint)], "messages")

    async def _prepare_chat(self, body: ChatRequest, adapter: Adapter, tools: Tools | None) -> PreparedPrompt:
        prompts = adapter.prompts
        interleaved = prompts.config.image_position == "as_is"
        marks = _marks(prompts, tools is not None)
        turns, urls, begun = read_messages(body.messages, marks, interleaved, tools)
        if tools is not None:
            turns = tools.introduced(turns, prompts, marks)
        several = len(urls) > 1
        images = await self._reader.read(urls, functools.partial(prompts.read, several=several), (prompts, several))
        return await prepare(self._engine, requests.Request(turns, images, begun), adapter)

    async def _submit_texts(self, body: TextRequest) -> Answers:
        adapter, texts = self._models.find(body.model), body.prompts()
        self._refuse_more_than_held(body.answers)
        self._refuse_long(sum(map(len, texts)), "prompt")
        constraint = await self._constraint(body, adapter.prompts, None)
        pairs = []
        for text in texts:
            prompt = await prepare(self._engine, text, adapter, "prompt")
            pairs += [(prompt, each) for each in samplings(body, body.limit, constraint, True)]
        return await self._submit(pairs, "prompt")

    async def _submit(self, pairs: Sequence[tuple[PreparedPrompt, requests.Sampling]], field: str) -> Answers:
        answers = Answers(self._engine, self._metrics, pairs, field)
        await answers.submit()
        return answers

    async def _constraint(self, body: Generation, prompts: PromptEncoder, tools: Tools | None) -> Constraint | None:
        """Compiled in a thread: it can take a large part of a second."""
        given = [("tools", "grammar", tools.grammar(prompts.tokenizer))] if tools is not None else body.constraints()
        if not given:
            return None
        field, kind, value = given[0]
        compiler = _constraints(prompts, self._engine.config.text.vocab_size)
        try:
            return await anyio.to_thread.run_sync(compiler.compile, kind, value, limiter=self._compiling)
        except UserError as error:
            raise ApiError(400, f"{field}: {error}", "invalid_value", field) from error

    def _refuse_oversize(self, body: ChatRequest) -> None:
        """Raises `ApiError` for what never fits, before it is decoded, tokenized or queued."""
        self._refuse_more_than_held(body.answers)
        parts = [part for message in body.messages for _, part in parts_of(message)]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        if (images := len(parts) - len(texts)) > self._max_images:
            context = f"the context of {self._engine.context} tokens"
            what = f"messages: {images} images, but {context} has room for {self._max_images} at most"
            raise ApiError(400, what, "too_many_images", "messages")
        calls = [call for message in body.messages for call in getattr(message, "tool_calls", None) or ()]
        self._refuse_long(sum(map(len, texts)) + sum(len(call.function.arguments) for call in calls), "messages")
        tools = (body.tools or ()) if body.calls_tools else ()
        self._refuse_long(sum(len(tool.function.model_dump_json()) for tool in tools), "tools")

    def _refuse_more_than_held(self, n: int) -> None:
        if n > (most := self._engine.capacity):
            what = f"n: {n} answers, but this server holds {most} at a time, those that wait included: ask for fewer"
            raise ApiError(400, what, "invalid_value", "n")

    def _refuse_long(self, length: int, field: str) -> None:
        if length > self._max_characters:
            what = f"{field}: {length} characters cannot fit into the context of {self._engine.context} tokens"
            raise ApiError(400, what, "context_length_exceeded", field)


@functools.lru_cache(maxsize=32)
def _marks(prompts: PromptEncoder, tools: bool) -> Marks:
    return Marks(prompts.tokenizer, prompts.template, tools)


@functools.lru_cache(maxsize=32)
def _constraints(prompts: PromptEncoder, vocabulary: int) -> Constraints:
    return Constraints(prompts, vocabulary)


def samplings(
    body: Generation, longest: int, constraint: Constraint | None = None, verbatim: bool = False
) -> list[requests.Sampling]:
    """One for each of the `n` answers. They differ by their seeds. Raises `ApiError`."""
    seed = secrets.randbits(32) if body.seed is None else body.seed
    stop = (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ())
    one = requests.Sampling(
        temperature=TEMPERATURE if body.temperature is None else body.temperature,
        top_p=1.0 if body.top_p is None else body.top_p,
        top_k=max(0, body.top_k or 0),
        min_p=body.min_p or 0.0,
        max_new_tokens=longest,
        stop=stop,
        logprobs=body.alternatives,
        repetition_penalty=body.repetition_penalty or 1.0,
        presence_penalty=body.presence_penalty or 0.0,
        frequency_penalty=body.frequency_penalty or 0.0,
        logit_bias=tuple((_token(token), bias) for token, bias in (body.logit_bias or {}).items()),
        stop_token_ids=tuple(body.stop_token_ids or ()),
        ignore_eos=bool(body.ignore_eos),
        constraint=constraint,
        verbatim=verbatim,
    )
    return [dataclasses.replace(one, seed=(seed + index) % 2**32) for index in range(body.n or 1)]


def _token(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        what = f"logit_bias: {text[:50]!r} is no token: its keys are ids"
        raise ApiError(400, what, "invalid_value", "logit_bias")
    return int(text)


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
