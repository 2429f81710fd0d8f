"""Renders the chat templates of tokenizers, which are untrusted Jinja programs.

The sandbox of transformers limits what they can reach, but not their time and memory. So they are rendered in a process
with limits. Nothing else in the package renders a template of a file.
"""

import functools
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from llava_jax.cli import UserError
from llava_jax.data.tokenizer_files import Tokenizer

CPU_SECONDS = 5
MEMORY = 512 * 2**20  # bytes
MAX_CHARACTERS = 2**20  # of a rendered conversation

Messages = list[dict[str, Any]]  # roles user, assistant and system


def render_chats(chats: list[Messages], chat_template: Any, tokenizer: Tokenizer) -> list[str | None]:
    """The text of each conversation, with the prompt of an answer where it ends with a question.

    Args:
      chats: the conversations.
      chat_template: as in transformers: a template, or a dict of which "default" is used.
      tokenizer: its special tokens are known to the template.

    Returns:
      A text is None if the template raises an error or renders more than `MAX_CHARACTERS`.

    Raises:
      UserError: rendering takes more time or memory than any chat template needs.
    """
    if isinstance(chat_template, dict):
        chat_template = chat_template.get("default")
    request = {"chats": chats, "template": chat_template, "tokens": tokenizer.special_tokens_map}
    return list(_rendered(json.dumps(request, default=str)))


@functools.lru_cache
def _rendered(request: str) -> tuple[str | None, ...]:
    command = [sys.executable, "-P", "-c", f"from {__name__} import _render; _render({CPU_SECONDS})"]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    child = subprocess.run(command, input=request.encode(), capture_output=True, env=environment)
    if child.returncode:
        last = (child.stderr.decode(errors="replace").splitlines() or [f"status {child.returncode}"])[-1]
        raise UserError(
            f"the tokenizer's chat template takes more than {CPU_SECONDS} s or {MEMORY >> 20} MiB to render ({last}): "
            "choose a template of conversations by its name, such as --template v1"
        )
    return tuple(json.loads(child.stdout))


def _render(cpu_seconds: int) -> None:
    """The process: reads a request from standard input, writes the texts to standard output."""
    from transformers.utils.chat_template_utils import render_jinja_template

    request = json.load(sys.stdin)
    _limit(cpu_seconds)
    json.dump([_text(chat, request, render_jinja_template) for chat in request["chats"]], sys.stdout)


def _text(chat: Messages, request: dict[str, Any], render: Callable[..., Any]) -> str | None:
    asks = chat[-1]["role"] == "user"
    try:
        (text,), _ = render([chat], chat_template=request["template"], add_generation_prompt=asks, **request["tokens"])
    except Exception:  # a template may raise anything
        return None
    return text if len(text) <= MAX_CHARACTERS else None


def _limit(cpu_seconds: int) -> None:
    if os.path.exists("/proc/self/statm"):  # macOS has none, and limits no memory either
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY,) * 2)
    cpu = resource.getrusage(resource.RUSAGE_SELF)
    resource.setrlimit(resource.RLIMIT_CPU, (round(cpu.ru_utime + cpu.ru_stime) + cpu_seconds,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
