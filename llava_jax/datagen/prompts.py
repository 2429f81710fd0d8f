"""Prompts: a system message and examples, from a directory in the layout that LLaVA's authors published.

It holds `system_message.txt` and for each example `NNN_caps.txt`, the context, and `NNN_conv.txt`, the answer.
"""

from pathlib import Path
from typing import NamedTuple

from llava_jax.cli import UserError
from llava_jax.files.reading import require_regular
from llava_jax.llm_api.cost import Message

OURS = Path(__file__).with_name("prompt_files")


class Prompts(NamedTuple):
    """The messages before the context."""

    system: str
    shots: tuple[tuple[str, str], ...]  # context and answer

    def messages(self, context: str) -> list[Message]:
        messages = [{"role": "system", "content": self.system}]
        for asked, answered in self.shots:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return [*messages, {"role": "user", "content": context}]


def load_prompts(directory: Path) -> Prompts:
    """Raises `UserError` for a file that is missing, empty or not text."""
    contexts = sorted(directory.glob("*_caps.txt"))
    shots = [(_text(path), _text(path.with_name(path.name.replace("_caps", "_conv")))) for path in contexts]
    if alone := [path for path in directory.glob("*_conv.txt") if not _context_of(path).exists()]:
        raise UserError(f"{alone[0]}: has no {_context_of(alone[0]).name} beside it")
    return Prompts(_text(directory / "system_message.txt"), tuple(shots))


def _context_of(answer: Path) -> Path:
    return answer.with_name(answer.name.replace("_conv", "_caps"))


def _text(path: Path) -> str:
    if path.exists():
        require_regular(path)
    try:
        text = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"{path}: {reason}; prompts are system_message.txt, and NNN_caps.txt with NNN_conv.txt for each example"
        ) from error
    if not text:
        raise UserError(f"{path}: is empty")
    return text
