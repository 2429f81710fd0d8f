"""The output of `predict`: answers in the original's format, by one process or several, resumable at any time.

Each process appends to a file of its own beside the output (`.part0`, `.part1`, ...). At the end the first process
writes the output, in the order of the questions, and the parts are removed. Answers that exist at the start are kept.
"""

import hashlib
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from llava_jax.cli import UserError
from llava_jax.evaluate.lines import read_lines
from llava_jax.evaluate.questions import Key, Question, key_of
from llava_jax.files.writing import atomic_file
from llava_jax.remote import is_remote

SECONDS = 30.0  # between writes of a part to an object store, which cannot append

Lines = dict[Key, dict[str, Any]]


def answer_line(
    question: Question, text: str | None, model_id: str, no_answer: str = "", settings: str = ""
) -> dict[str, Any]:
    """An answer in the original's format. Its id is a hash of it.

    Args:
      no_answer: the reason why there is none.
      settings: identifies the model and how it was asked.
    """
    answer_id = hashlib.sha256(json.dumps([model_id, *question.key, text]).encode()).hexdigest()[:22]
    line = {"question_id": question.id, "prompt": question.text, "text": text, "answer_id": answer_id}
    known = {"no_answer": no_answer, "settings": settings}
    metadata = {name: value for name, value in known.items() if value}
    return line | {"model_id": model_id, "metadata": metadata} | question.extra


class AnswerFile:
    """The answers of a model to `questions`, as far as they exist.

    Args:
      settings: of the model and of sampling, on which the answers depend: those of others are refused.

    Attributes:
      lines: by the key of the question.
    """

    def __init__(
        self,
        output: epath.PathLike,
        questions: Sequence[Question],
        model_id: str,
        process: int = 0,
        settings: Mapping[str, Any] | None = None,
    ):
        self.output, self.model_id = epath.Path(output), model_id
        text = json.dumps(settings, sort_keys=True)
        self._settings = hashlib.sha256(text.encode()).hexdigest()[:16] if settings else ""
        self._part = epath.Path(f"{output}.part{process}")
        self._keys = [question.key for question in questions]
        self.lines: Lines = {}
        for file in [self.output, *self._parts()]:
            if file.exists():
                self.lines |= self._read(file)
        self._written = time.monotonic()
        self._own: Lines = self._read(self._part) if self._part.exists() else {}

    def answers(self, question: Question) -> bool:
        """Whether a question has an answer. Otherwise it is asked, also if an earlier run got no answer."""
        line = self.lines.get(question.key)
        return line is not None and "no_answer" not in (line.get("metadata") or ())

    def add(self, answers: Sequence[tuple[Question, str | None]], no_answer: Mapping[Key, str] | None = None) -> None:
        """Writes answers, on an object store only every `SECONDS`. `no_answer` has the reasons why some are none."""
        why = no_answer or {}
        new = {q.key: answer_line(q, text, self.model_id, why.get(q.key, ""), self._settings) for q, text in answers}
        self.lines |= new
        self._own |= new
        if not is_remote(self._part):
            self._part.parent.mkdir(parents=True, exist_ok=True)
            with self._part.open("ab") as file:
                file.write(_encode(new.values()))
        elif time.monotonic() - self._written > SECONDS:
            self.flush()

    def flush(self) -> None:
        """Writes the answers that are only in memory."""
        if self._own and is_remote(self._part):
            _write(self._part, self._own.values())
            self._written = time.monotonic()

    def finish(self, lines: Mapping[Key, dict[str, Any]]) -> int:
        """Writes the output from the lines of all processes, and removes the parts. Returns the number of answers."""
        answered = [lines[key] for key in self._keys if key in lines]
        _write(self.output, answered)
        for part in self._parts():
            part.unlink(missing_ok=True)
        return len(answered)

    def remove_part(self) -> None:
        """Removes this process's part, which may be on a local disk, after the output is written."""
        self._part.unlink(missing_ok=True)

    def _parts(self) -> list[epath.Path]:
        return sorted(self.output.parent.glob(f"{self.output.name}.part[0-9]*")) if self.output.parent.exists() else []

    def _read(self, file: epath.Path) -> Lines:
        """The answers in a file. Raises `UserError` for answers to other questions, or by a model that is another one
        or was asked otherwise.

        A last line that is cut off is skipped, and removed from this process's own part, to which more is appended.
        """
        asked = set(self._keys)
        lines: Lines = {}
        for line in read_lines(file, partial=True):
            for name in ("question_id", "prompt", "text"):
                line.get(name)
            key = key_of(line.value)
            if key not in asked:
                raise UserError(
                    f"{line.where}: answers question {key[0]}, as it isn't asked now: choose another output"
                )
            if (other := line.value.get("model_id")) != self.model_id:
                raise UserError(f"{line.where}: is by {other}, not by {self.model_id}: choose another output")
            metadata = line.value.get("metadata")
            told = metadata.get("settings") if isinstance(metadata, dict) else None
            if told and self._settings and told != self._settings:
                raise UserError(
                    f"{line.where}: is by another checkpoint or step than {self.model_id} is now, or was asked with "
                    "another template, sampling or prompt: choose another output"
                )
            lines[key] = line.value
        if file == self._part and not file.read_bytes().endswith(b"\n"):
            _write(file, lines.values())
        return lines


def _encode(lines: Iterable[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line, ensure_ascii=False).encode() + b"\n" for line in lines)


def _write(path: epath.Path, lines: Iterable[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(path) as file:
        file.write(_encode(lines))
