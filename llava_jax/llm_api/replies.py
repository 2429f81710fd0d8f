"""The replies of a server with status 200: a completion, or an error that some gateways send in its place."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llava_jax.files.reading import loads
from llava_jax.llm_api.cost import Message, estimate_tokens, max_prompt_tokens
from llava_jax.llm_api.errors import CODES, MESSAGES, UNKNOWN, ServerError, TransientError, server_error, unlisted
from llava_jax.llm_api.ledger import CUT_OFF, FILTERED, Answer

BROKEN = ("error", "abort", "cancelled")  # finish reasons of answers that the server did not finish
FINISH_REASONS = {
    **dict.fromkeys(("max_tokens", "model_length", "max_output_tokens"), CUT_OFF),
    **dict.fromkeys(("refusal", "safety", "image_safety", "prohibited_content", "blocklist", "spii", "recitation",
                     "content_filtered", "guardrail_intervened"), FILTERED),
}  # fmt: skip


def read_json(content: bytes) -> Any:
    """The JSON of a reply. Raises `TransientError` for other text, and `ServerError` for an HTML page."""
    try:
        return loads(content, strict=False)
    except ValueError as error:
        if content.lstrip()[:1] == b"<":
            page = " ".join(content.decode(errors="replace").split())
            raise ServerError(UNKNOWN, f"an HTML page, no answer; is the path of the URL right? {page}") from error
        raise TransientError(f"the answer is no JSON: {error}", charged=True) from error


def read_completion(completion: Any, messages: Sequence[Message], max_tokens: int) -> Answer:
    """The answer in the JSON of a chat completion. Token counts are estimated where the server's cannot be true.

    Args:
      max_tokens: of the answer, 0 for no limit.

    Raises:
      TransientError: there is no answer.
      ServerError: there is an error in its place.
    """
    completion = unlisted(completion)
    _check(completion)
    try:
        choice = completion["choices"][0]
        text, refusal = _text(choice["message"].get("content")), choice["message"].get("refusal")
        finish_reason = str(choice.get("finish_reason") or "stop").lower().partition(":")[0]  # "content_filter: SAFETY"
        finish_reason = FINISH_REASONS.get(finish_reason, finish_reason)
        if not text and refusal:
            text, finish_reason = str(refusal), FILTERED
    except (LookupError, TypeError, AttributeError) as error:
        raise TransientError(
            f"the answer is no chat completion: {json.dumps(completion)[:100]}", charged=True
        ) from error
    usage = completion.get("usage")
    if _possible(usage, text, max_prompt_tokens(messages), max_tokens or sys.maxsize):
        return Answer(text, finish_reason, usage["prompt_tokens"], usage["completion_tokens"] + _thought(usage))
    written = min(estimate_tokens([{"content": text or ""}]), max_tokens or sys.maxsize)
    if finish_reason == CUT_OFF:  # it may have thought until then
        written = max_tokens or written
    return Answer(text, finish_reason, estimate_tokens(messages), written, "estimated")


def join_chunks(chunks: Iterable[Any]) -> dict[str, Any]:
    """The completion that was streamed in chunks. Raises as `read_completion` does."""
    texts: list[str] = []
    refusals: list[str] = []
    finish_reason, usage = None, None
    for chunk in chunks:
        _check(chunk)
        try:
            usage = chunk.get("usage") or usage
            for choice in chunk.get("choices") or ():
                delta = choice.get("delta") or {}
                texts += [text] if (text := _text(delta.get("content"))) is not None else []
                refusals += [delta["refusal"]] if delta.get("refusal") else []
                finish_reason = choice.get("finish_reason") or finish_reason
        except (LookupError, TypeError, AttributeError) as error:
            raise TransientError(
                f"the stream has no chunk of an answer: {json.dumps(chunk)[:100]}", charged=True
            ) from error
    if finish_reason is None:
        raise TransientError("the stream was cut", charged=True)
    message = {"content": "".join(texts) if texts else None, "refusal": "".join(refusals)}
    return {"choices": [{"message": message, "finish_reason": finish_reason}], "usage": usage}


def _check(completion: Any) -> None:
    """Raises `ServerError` if a completion, or its choice, is an error or holds one."""
    if not isinstance(completion, Mapping):
        return
    choices = completion.get("choices")
    choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], Mapping) else {}
    has_error = any(completion.get(name) for name in ("error", "errors"))
    if has_error or completion.get("object") == "error" or not choices and completion.keys() & {*MESSAGES, *CODES}:
        raise server_error({name: value for name, value in completion.items() if name != "choices"})
    if not choices and completion.get("base_resp"):
        raise server_error(completion["base_resp"])
    if choice.get("error"):
        raise server_error(choice["error"])
    if choice.get("finish_reason") in BROKEN:
        raise ServerError(UNKNOWN, f"the server gave up the answer (finish_reason {choice['finish_reason']})")


def _text(content: Any) -> str | None:
    """The text of a message: its content, or the parts of it that are text, not thinking."""
    if isinstance(content, list):
        parts = [{"text": part} if isinstance(part, str) else part for part in content]
        texts = [part["text"] for part in parts if part.get("type", "text") in ("text", "output_text")]
        content = "".join(texts) if texts else None
    # Lone surrogates cannot be stored.
    return None if content is None else content.encode(errors="replace").decode()


def _thought(usage: dict[str, Any]) -> int:
    """The tokens of thinking that some servers (xAI, Gemini) count beside those of the completion: the sum tells."""
    details, total = usage.get("completion_tokens_details"), usage.get("total_tokens")
    beside = total - usage["prompt_tokens"] - usage["completion_tokens"] if type(total) is int else 0
    thought = details.get("reasoning_tokens") if isinstance(details, dict) else None
    return beside if beside > 0 and thought in (None, beside) else 0


def _possible(usage: Any, text: str | None, max_prompt: int, max_completion: int) -> bool:
    """Whether the server's token counts can be true."""
    if not isinstance(usage, dict):
        return False
    prompt, completion = usage.get("prompt_tokens"), usage.get("completion_tokens")
    if type(prompt) is not int or type(completion) is not int:
        return False
    return 0 < prompt <= max_prompt and bool(text) <= completion <= max_completion
