"""The responses with answers: one object, or server-sent events."""

import abc
import contextlib
import time
import uuid
from collections.abc import AsyncIterator, Iterator, Sequence
from typing import Any

from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from openai.types import Completion, CompletionChoice, CompletionUsage
from openai.types.chat import (
    ChatCompletion,
    ChatCompletionChunk,
    ChatCompletionMessage,
    ChatCompletionMessageFunctionToolCall,
    ChatCompletionTokenLogprob,
)
from openai.types.chat import chat_completion as complete
from openai.types.chat import chat_completion_chunk as streamed
from openai.types.chat.chat_completion_token_logprob import TopLogprob
from openai.types.completion_choice import Logprobs
from starlette.types import Receive, Scope, Send

from llava_jax.inference.answer import Piece, TokenLogprob
from llava_jax.serve.answers import Answers
from llava_jax.serve.errors import ApiError
from llava_jax.serve.schema import ChatRequest, TextRequest
from llava_jax.serve.tools import Call, parser_of


class Reply(abc.ABC):
    """The response with `answers`."""

    def __init__(self, answers: Answers):
        self.answers = answers

    @abc.abstractmethod
    async def completion(self) -> str:
        """All answers as JSON."""

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events."""
        try:
            for event in self.begin():
                yield event
            async for index_piece in self.answers.pieces():
                if index_piece is None:
                    yield KEEPALIVE_COMMENT
                    continue
                index, piece = index_piece
                for event in self.end(index) if piece is None else self.add(index, piece):
                    yield event
            for event in self.finish():
                yield event
        except ApiError as error:  # the status has been sent already
            yield self.failure(error)

    @abc.abstractmethod
    def begin(self) -> Iterator[bytes]:
        """Events before the answers."""

    @abc.abstractmethod
    def add(self, index: int, piece: Piece) -> Iterator[bytes]:
        """Events for a piece of an answer."""

    @abc.abstractmethod
    def end(self, index: int) -> Iterator[bytes]:
        """Events for the end of an answer."""

    def finish(self) -> Iterator[bytes]:
        """Events after the answers."""
        yield format_sse_event(data_str="[DONE]")

    def failure(self, error: ApiError) -> bytes:
        return format_sse_event(data_str=error.response().body.decode())

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """(index of an answer, its next piece). Cancels the answers that are unfinished where it ends."""
        try:
            async for event in self.answers.pieces():
                if event is not None and event[1] is not None:
                    yield event
        finally:
            self.answers.cancel()

    def usage(self) -> CompletionUsage:
        answers = self.answers.answers
        prompts = {id(answer.prompt): answer.prompt_tokens for answer in answers}
        prompt, completion = sum(prompts.values()), sum(answer.completion_tokens for answer in answers)
        return CompletionUsage(prompt_tokens=prompt, completion_tokens=completion, total_tokens=prompt + completion)


class ChatReply(Reply):
    """A `ChatCompletion`, or for each answer its role, text, calls and finish reason; then the usage and `[DONE]`."""

    def __init__(self, body: ChatRequest, answers: Answers):
        super().__init__(answers)
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self._with_usage, self._with_logprobs = body.with_usage, bool(body.logprobs)
        self._parsers = [parser_of(body, answers.template) for _ in answers.answers]

    async def completion(self) -> str:
        """Log-probabilities become text as they arrive, which takes much less memory."""
        texts = ["" for _ in self.answers.answers]
        logprobs: list[list[str]] = [[] for _ in texts]
        async for index, piece in self.pieces():
            texts[index] += _split(self._parsers[index].push(piece.text))[0]
            tokens = map(_token_logprob, piece.token_logprobs)
            logprobs[index] += [token.model_dump_json(exclude_unset=True) for token in tokens]
        choices = []
        for index, parser in enumerate(self._parsers):
            texts[index] += parser.close()
            message = ChatCompletionMessage(role="assistant", content=texts[index], refusal=None)
            if parser.calls:
                content = texts[index] or None
                message = message.model_copy(update={"content": content, "tool_calls": list(map(_call, parser.calls))})
            choices.append(
                complete.Choice(
                    index=index,
                    finish_reason=self._finish_reason(index),
                    message=message,
                    logprobs=self._logprobs(complete.ChoiceLogprobs, []),
                )
            )
        completion = ChatCompletion(object="chat.completion", choices=choices, usage=self.usage(), **self._head)
        before, *after = completion.model_dump_json(exclude_unset=True).split(
            '"content":[]'
        )  # not in a string, where quotes are escaped
        filled = (f'"content":[{",".join(own)}]{rest}' for own, rest in zip(logprobs, after, strict=False))
        return before + "".join(filled)

    def begin(self) -> Iterator[bytes]:
        for index in range(len(self.answers.answers)):
            yield self._chunk(index, role="assistant", content="")

    def add(self, index: int, piece: Piece) -> Iterator[bytes]:
        parser = self._parsers[index]
        text, calls = _split(parser.push(piece.text))
        if text or piece.token_logprobs or not parser.active:
            yield self._chunk(index, piece.token_logprobs, content=text)
        for number, call in enumerate(calls, len(parser.calls) - len(calls)):
            named = streamed.ChoiceDeltaToolCallFunction(name=call.name, arguments="")
            head = {"id": call.id, "type": "function", "function": named}
            yield self._chunk(index, tool_calls=[streamed.ChoiceDeltaToolCall(index=number, **head)])
            arguments = streamed.ChoiceDeltaToolCallFunction(arguments=call.arguments)
            yield self._chunk(index, tool_calls=[streamed.ChoiceDeltaToolCall(index=number, function=arguments)])

    def end(self, index: int) -> Iterator[bytes]:
        if rest := self._parsers[index].close():
            yield self._chunk(index, content=rest)
        yield self._chunk(index, finish_reason=self._finish_reason(index))

    def finish(self) -> Iterator[bytes]:
        if self._with_usage:
            yield self._event([], usage=self.usage())
        yield from super().finish()

    def _finish_reason(self, index: int) -> str:
        reason = self.answers.answers[index].finish_reason
        return "tool_calls" if reason == "stop" and self._parsers[index].calls else reason

    def _chunk(
        self, index: int, logprobs: Sequence[TokenLogprob] = (), finish_reason: str | None = None, **delta: Any
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

    def _logprobs(self, kind: type, tokens: Sequence[TokenLogprob]) -> Any:
        if not self._with_logprobs:
            return None
        return kind(content=[_token_logprob(token) for token in tokens], refusal=None)


class TextReply(Reply):
    """A `Completion`, or one for each piece and the finish reasons; then the usage and `[DONE]`."""

    def __init__(self, body: TextRequest, answers: Answers):
        super().__init__(answers)
        self._head = {"id": f"cmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": body.model}
        self._head["object"] = "text_completion"
        self._with_usage, self._with_logprobs = body.with_usage, body.logprobs is not None
        begun = [answer.prompt.request.begun for answer in answers.answers]
        self._echoed = begun if body.echo else ["" for _ in begun]
        self._lengths = list(map(len, self._echoed))  # characters of each text so far

    async def completion(self) -> str:
        texts = list(self._echoed)
        logprobs = [Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[]) for _ in texts]
        async for index, piece in self.pieces():
            texts[index] += piece.text
            if self._with_logprobs:
                for name, values in self._logprobs(index, piece):
                    getattr(logprobs[index], name).extend(values)
        choices = [
            self._choice(index, text, own if self._with_logprobs else None, answer.finish_reason)
            for index, (text, own, answer) in enumerate(zip(texts, logprobs, self.answers.answers, strict=True))
        ]
        return self._json(choices, usage=self.usage())

    def begin(self) -> Iterator[bytes]:
        for index, text in enumerate(self._echoed):
            if text:
                yield self._event([self._choice(index, text)])

    def add(self, index: int, piece: Piece) -> Iterator[bytes]:
        logprobs = self._logprobs(index, piece) if self._with_logprobs and piece.token_logprobs else None
        yield self._event([self._choice(index, piece.text, logprobs)])

    def end(self, index: int) -> Iterator[bytes]:
        yield self._event([self._choice(index, "", reason=self.answers.answers[index].finish_reason)])

    def finish(self) -> Iterator[bytes]:
        if self._with_usage:
            yield self._event([], usage=self.usage())
        yield from super().finish()

    def _logprobs(self, index: int, piece: Piece) -> Logprobs:
        logprobs = Logprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token in piece.token_logprobs:
            logprobs.tokens.append(token.token)
            logprobs.token_logprobs.append(token.logprob)
            logprobs.top_logprobs.append({other.token: other.logprob for other in token.top})
            logprobs.text_offset.append(self._lengths[index])
            self._lengths[index] += len(token.token)
        return logprobs

    def _choice(
        self, index: int, text: str, logprobs: Logprobs | None = None, reason: str | None = None
    ) -> CompletionChoice:
        fields = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}
        return CompletionChoice.model_construct(**fields)  # the type knows no choice that is unfinished

    def _event(self, choices: list[CompletionChoice], **more: Any) -> bytes:
        return format_sse_event(data_str=self._json(choices, **more))

    def _json(self, choices: list[CompletionChoice], **more: Any) -> str:
        completion = Completion.model_construct(choices=choices, **self._head, **more)
        return completion.model_dump_json(exclude_unset=True, warnings=False)


class EventStream(StreamingResponse):
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


def _split(parts: Sequence[str | Call]) -> tuple[str, list[Call]]:
    """The text of an answer's parts, and its calls, which a message has apart."""
    return "".join(part for part in parts if isinstance(part, str)), [p for p in parts if isinstance(p, Call)]


def _call(call: Call) -> ChatCompletionMessageFunctionToolCall:
    function = {"name": call.name, "arguments": call.arguments}
    return ChatCompletionMessageFunctionToolCall(id=call.id, type="function", function=function)


def _token_logprob(token: TokenLogprob) -> ChatCompletionTokenLogprob:
    top = [TopLogprob(token=other.token, bytes=list(other.bytes), logprob=other.logprob) for other in token.top]
    return ChatCompletionTokenLogprob(
        token=token.token, bytes=list(token.bytes), logprob=token.logprob, top_logprobs=top
    )
