"""The errors that servers report, and when to try again."""

import email.utils
from types import SimpleNamespace

import pytest

from llava_jax.llm_api import errors
from llava_jax.llm_api.errors import Refusal, server_error


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"retry-after": "7"}, 7),
        ({"retry-after": "0.25"}, 0.25),
        ({"retry-after": "7", "retry-after-ms": "250"}, 0.25),
        ({"retry-after": "-3"}, 0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:00 GMT"}, 0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "inf"}, None),
        ({}, None),
    ],
)
def test_forms_of_retry_after(headers: dict[str, str], seconds: float | None):
    assert errors.retry_after(headers) == seconds


def test_a_date_in_retry_after_is_waited_for(monkeypatch: pytest.MonkeyPatch):
    date = email.utils.formatdate(1_000_090, usegmt=True)
    monkeypatch.setattr(errors, "time", SimpleNamespace(time=lambda: 1_000_000.0))
    assert errors.retry_after({"retry-after": date}) == 90


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (429, {"message": "slow down"}, "rate_limited"),
        (429, {"message": "spent", "code": "insufficient_quota"}, "permanent"),
        (401, {"message": "no such key"}, "permanent"),
        (503, {"message": "down"}, "transient"),
        (408, {"message": "too late"}, "transient"),
        (400, {"message": "flagged by moderation"}, "filtered"),
        (403, {"message": "flagged by moderation"}, "filtered"),
    ],
)
def test_kinds_of_errors(status: int, body: dict[str, str], kind: str):
    error = server_error({"error": body}, status)
    kinds = ("rate_limited", "transient", "permanent", "filtered")
    assert [name for name in kinds if getattr(error, name)] == [kind]
    assert str(error) == f"status {status}: {body['message']}"


def test_a_refusal_names_what_was_too_much():
    error = server_error("rate limit reached", 429)
    assert error.refusal == Refusal(None)
    error.headers = {"retry-after": "3", "x-ratelimit-remaining-tokens": "0"}
    assert error.refusal == Refusal(3.0, of_tokens=True)
    assert server_error("Limit of 200 tokens per min", 429).refusal.of_tokens
