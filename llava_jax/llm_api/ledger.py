"""The ledger: every request that was sent, its answer and cost, and one result for each task, in SQLite.

A row is written before its request is sent and completed when the answer or the error comes. An answered request is
never sent again. When a process dies, only the answers of requests under way are lost; these count as paid in full.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from etils import epath

from llava_jax.cli import UserError
from llava_jax.files.lock import hold
from llava_jax.llm_api.cost import Message, estimate_tokens
from llava_jax.llm_api.thinking import after_thinking

SCHEMA = Path(__file__).with_name("ledger.sql").read_text(encoding="utf-8")
ACCEPTED = "accepted"
CHECKPOINT = 4096  # pages of 4 KB between waits for the disk, during which no answer is read


@dataclass(frozen=True)
class Request:
    """A prompt for a task: the first attempt at it, 0, or a later one."""

    task: str
    attempt: int
    messages: Sequence[Message]

    @cached_property
    def messages_json(self) -> bytes:
        return json.dumps(self.messages).encode()

    @cached_property
    def prompt_hash(self) -> str:
        return hashlib.sha256(self.messages_json).hexdigest()


CUT_OFF, FILTERED = "length", "content_filter"


class Answer(NamedTuple):
    """The answer of a model. `finish_reason` is the API's: stop, length, content_filter."""

    text: str | None  # None where the server sent none
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int
    usage: str = "reported"
    thought: bool = False  # whether the model thought before the text, and that ended

    def after_thinking(self) -> "Answer":
        """The answer without the thinking before it. If the thinking does not end, the answer counts as cut off."""
        text = self.text and after_thinking(self.text)
        if self.text and text is None:
            return self._replace(text=None, finish_reason=CUT_OFF)
        return self._replace(text=text, thought=self.thought or text != self.text)


class Batch(NamedTuple):
    """Requests that are sent together. `id` is the server's, None until it is known."""

    number: int
    name: str
    made: float
    id: str | None


class Totals(NamedTuple):
    requests: int
    prompt_tokens: int
    completion_tokens: int
    cost: float


class Ledger:
    """Opened by one process at a time. Every method that writes is one transaction."""

    def __init__(self, path: Path, model: str = "", parameters: dict[str, Any] | None = None):
        self._new = [] if path.exists() else [path, *(folder for folder in path.parents if not folder.exists())]
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self.model, self.parameters = path, model, json.dumps(parameters or {}, sort_keys=True)
        self._held, self._opened = ExitStack(), time.time()
        self._held.enter_context(hold(epath.Path(path.parent)))
        try:
            self.db = sqlite3.connect(path, isolation_level=None)
            self.db.execute("PRAGMA journal_mode = WAL")
            self.db.execute("PRAGMA synchronous = NORMAL")  # a kill loses nothing, a power cut the last moments
            self.db.execute(f"PRAGMA wal_autocheckpoint = {CHECKPOINT}")
            self.db.executescript(SCHEMA)
            self.db.execute("UPDATE requests SET state = 'lost', finished = ? WHERE state = 'sent'", [time.time()])
        except sqlite3.DatabaseError as error:
            self._held.close()
            raise UserError(f"{path}: is no ledger ({error}); choose another directory") from error

    def close(self) -> None:
        self.db.close()
        self._held.close()

    def discard(self) -> None:
        """Closes the ledger, and removes its file and folders unless they existed before."""
        self.close()
        for made in self._new:
            with suppress(OSError):  # a folder that holds something else, too
                made.unlink() if made == self.path else made.rmdir()

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Writes all or nothing. A transaction inside another one is a part of that."""
        if self.db.in_transaction:
            yield
            return
        self.db.execute("BEGIN IMMEDIATE")
        with self.db:  # commits, or rolls back after an exception
            yield

    def identify(self, identity: dict[str, Any]) -> None:
        """Makes it the ledger of this work.

        Raises `UserError` with the differences if it is the ledger of other work and holds answers. Work of which all
        requests were refused may be started again with other options.
        """
        wanted = {key: json.dumps(value, sort_keys=True) for key, value in identity.items()}
        found = dict(self.db.execute("SELECT key, value FROM identity"))
        if found and self.in_use():
            changes = [f"{key}: {found.get(key)} there, {wanted.get(key)} now" for key in sorted({*wanted, *found})
                       if wanted.get(key) != found.get(key)]  # fmt: skip
            if changes:
                raise UserError(f"{self.path} was made for other work ({'; '.join(changes)}); choose another directory")
        else:
            with self.transaction():
                self.db.execute("DELETE FROM identity")
                self.db.executemany("INSERT INTO identity VALUES (?, ?)", wanted.items())

    def in_use(self) -> bool:
        """Whether a request was answered or may have been, or a task has its result."""
        requests = "EXISTS (SELECT 1 FROM requests WHERE state NOT IN ('failed', 'unsent'))"
        return bool(self.db.execute(f"SELECT {requests} OR EXISTS (SELECT 1 FROM results)").fetchone()[0])

    # ------------------------------------------------------------------------------------------------- requests

    def begin(self, request: Request, reserved: float, batch: int | None = None) -> int:
        """Notes that a request is about to be sent, which costs `reserved` dollars at most. Returns its row."""
        return self.db.execute(
            "INSERT INTO requests"
            " (task, attempt, prompt_hash, model, parameters, state, sent, prompt_tokens, cost, batch)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            [request.task, request.attempt, request.prompt_hash, self.model, self.parameters,
             "sent" if batch is None else "batched", time.time(), estimate_tokens(request.messages), reserved, batch],
        ).lastrowid  # fmt: skip

    def answered(self, row: int, answer: Answer, cost: float) -> None:
        *stored, _ = answer  # the text shows whether the model thought
        self.db.execute(
            "UPDATE requests SET state = 'answered', finished = ?, answer = ?, finish_reason = ?, prompt_tokens = ?,"
            " completion_tokens = ?, usage = ?, cost = ? WHERE id = ?",
            [time.time(), *stored, cost, row],
        )

    def failed(self, row: int, error: str, cost: float) -> None:
        self.db.execute(
            "UPDATE requests SET state = 'failed', finished = ?, error = ?, cost = ? WHERE id = ?",
            [time.time(), error, cost, row],
        )

    def answer(self, request: Request) -> Answer | None:
        """The answer to a request without its thinking, if there is one.

        Raises `UserError` if the same attempt had another prompt.
        """
        query = (
            "SELECT prompt_hash, answer, finish_reason, prompt_tokens, completion_tokens, usage FROM requests"
            " WHERE task = ? AND attempt = ? AND state = 'answered'"
        )
        row = self.db.execute(query, [request.task, request.attempt]).fetchone()
        if row and row[0] != request.prompt_hash:
            raise UserError(f"{self.path}: {request.task} was asked with another prompt; choose another directory")
        return Answer(*row[1:]).after_thinking() if row else None

    def has_thinking(self) -> bool:
        """Whether the model thought before any answer."""
        query = "SELECT answer FROM requests WHERE state = 'answered' AND answer IS NOT NULL"
        return any(after_thinking(text) != text for (text,) in self.db.execute(query))

    def failures(self, request: Request) -> int:
        """How often the request has failed since the ledger was opened."""
        query = "SELECT COUNT(*) FROM requests WHERE task = ? AND attempt = ? AND state = 'failed' AND finished >= ?"
        return self.db.execute(query, [request.task, request.attempt, self._opened]).fetchone()[0]

    def last_answer(self, task: str) -> str | None:
        """The text of the last answer to a task, if there is one."""
        query = "SELECT answer FROM requests WHERE task = ? AND state = 'answered' ORDER BY attempt DESC LIMIT 1"
        row = self.db.execute(query, [task]).fetchone()
        return row[0] if row else None

    def totals(self) -> Totals:
        query = "SELECT COUNT(*), TOTAL(prompt_tokens), TOTAL(completion_tokens), TOTAL(cost) FROM requests"
        requests, prompt, completion, cost = self.db.execute(query).fetchone()
        return Totals(requests, int(prompt), int(completion), cost)

    def answer_count(self) -> int:
        return self.db.execute("SELECT COUNT(*) FROM requests WHERE state = 'answered'").fetchone()[0]

    def answer_tokens(self) -> float | None:
        """The mean number of tokens of an answer, None without answers."""
        return self.db.execute("SELECT AVG(completion_tokens) FROM requests WHERE state = 'answered'").fetchone()[0]

    # -------------------------------------------------------------------------------------------------- batches

    def add_batch(self, name: str) -> int:
        """Notes that a batch is about to be made. Returns its number."""
        return self.db.execute("INSERT INTO batches (name, made) VALUES (?, ?)", [name, time.time()]).lastrowid

    def note_batch(self, number: int, id: str) -> None:
        self.db.execute("UPDATE batches SET id = ? WHERE number = ?", [id, number])

    def open_batches(self) -> list[Batch]:
        """The batches whose answers are not in the ledger yet."""
        return [Batch(*row) for row in self.db.execute("SELECT number, name, made, id FROM batches WHERE NOT done")]

    def batched(self, number: int) -> list[tuple[int, str]]:
        """Row and task of the requests in a batch that have no answer."""
        query = "SELECT id, task FROM requests WHERE batch = ? AND state = 'batched' ORDER BY id"
        return self.db.execute(query, [number]).fetchall()

    def close_batch(self, number: int, why: str) -> None:
        """No more answers will come: requests without one count as never sent."""
        self.db.execute("UPDATE batches SET done = 1 WHERE number = ?", [number])
        self.db.execute(
            "UPDATE requests SET state = 'unsent', finished = ?, error = ?, cost = 0"
            " WHERE batch = ? AND state = 'batched'",
            [time.time(), why, number],
        )

    # -------------------------------------------------------------------------------------------------- results

    def conclude(self, task: str, verdict: str, value: Any, attempts: Sequence[str]) -> None:
        """Notes the final result of a task, and the verdict on each of its answers."""
        with self.transaction():
            self.db.execute("INSERT INTO results VALUES (?, ?, ?)", [task, verdict, json.dumps(value)])
            self.db.executemany(
                "UPDATE requests SET verdict = ? WHERE task = ? AND attempt = ? AND state = 'answered'",
                [(reason, task, attempt) for attempt, reason in enumerate(attempts)],
            )

    def result(self, task: str) -> tuple[str, Any] | None:
        """The verdict on a task and its value, if it has one."""
        row = self.db.execute("SELECT verdict, value FROM results WHERE task = ?", [task]).fetchone()
        return (row[0], json.loads(row[1])) if row else None

    def revise(self, verdicts: Iterable[tuple[str, str]]) -> None:
        """Replaces the verdicts on tasks, pairs of task and verdict. Their values stay."""
        with self.transaction():
            self.db.executemany(
                "UPDATE results SET verdict = ? WHERE task = ?", [(verdict, task) for task, verdict in verdicts]
            )

    def verdicts(self) -> dict[str, int]:
        """The number of tasks with each verdict."""
        return dict(self.db.execute("SELECT verdict, COUNT(*) FROM results GROUP BY verdict ORDER BY 2 DESC, 1"))
