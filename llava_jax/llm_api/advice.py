"""The way out of an error about a parameter of a request, as an option to give."""

import json
import re
from typing import Any

from llava_jax.llm_api.errors import ServerError
from llava_jax.llm_api.settings import Settings

ANSWER_LENGTH = re.compile(r"max_\w*tokens|context.length|\bcontext\b", re.IGNORECASE)
TOO_LARGE = re.compile(r"too (large|many|long|high)|context|at most|less than|exceed|reduce", re.IGNORECASE)
TOO_SMALL = re.compile(r"too (small|low)|at least|minimum|greater than|higher|larger", re.IGNORECASE)
NO_PATH = re.compile(r"://[^/]+/?$|/(chat/)?completions/?$")  # an address without its path, or with that of requests
NO_SYSTEM = re.compile(r"system.{0,9} role|role.{0,40}\bsystem\b|system (message|prompt)s? (is|are) not", re.IGNORECASE)


def advice(error: ServerError, settings: Settings) -> str:
    """`: ` and the option to give, if the error is about a parameter that the requests have; else empty."""
    text, body = str(error), settings.body | ({"stream": True, "stream_options": {}} if settings.stream else {})
    limit = next((name for name in ("max_completion_tokens", "max_tokens") if name in body), "")
    if limit and ANSWER_LENGTH.search(f"{error.parameter} {error.code} {text}"):
        option = "--max-tokens" if limit == "max_tokens" else f"{limit} in --body"
        for size, words in (("smaller", TOO_LARGE), ("larger", TOO_SMALL)):
            if words.search(text):
                return f": give a {size} {option}"
    if error.status == 404 and NO_PATH.search(settings.base_url or ""):
        return ": is the address right? It ends with /v1, as http://localhost:8000/v1"
    if error.status not in (400, 422):
        return ""
    named = [name for name in body if name == error.parameter or re.search(rf"\b{re.escape(name)}\b", text)]
    if not named:
        return ": the model takes no system prompt, as this command sends" if NO_SYSTEM.search(text) else ""
    return f": add --body '{json.dumps(_changes(named, body))}'"


def _changes(named: list[str], body: dict[str, Any]) -> dict[str, Any]:
    """The values for --body that take out or replace the parameters that an error names."""
    changes: dict[str, Any] = dict.fromkeys(named)
    if {"temperature", "top_p"} <= changes.keys():  # some models take either, but not both
        del changes["temperature"]
    if "stream_options" in changes:
        changes = {"stream": None}
    if "max_tokens" in changes:
        changes["max_completion_tokens"] = body.get("max_completion_tokens", body["max_tokens"])
    elif "max_completion_tokens" in changes:
        changes["max_tokens"] = body["max_completion_tokens"]
    return changes
