"""The batch API of the scripted server: files and batches, in memory."""

import json
import re
import time
from collections.abc import Callable
from typing import Any

Reply = tuple[int, Any]  # status, JSON or bytes


class ScriptedBatches:
    """Batches are completed once they were looked at `looks` times.

    `answer` makes status and body from the body of a request. `fate`, if given, is how the next batches end instead
    (`failed`, `expired`), an expired one with half of its answers; `broken` has the next POST of a batch answer 500
    after the batch was made; `away` is how often looks at batches and their files are answered 503; requests for which
    `omits` is true are in no file of answers.
    """

    def __init__(self, answer: Callable[[dict[str, Any]], tuple[int, Any]], looks: int = 2):
        self.answer, self.looks = answer, looks
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.fates: list[str] = []
        self.broken = self.away = 0
        self.omits: Callable[[dict[str, Any]], bool] = lambda body: False

    def handle(self, method: str, path: str, body: bytes) -> Reply | None:
        """The reply to a request, None for an unknown path."""
        if self.away and method == "GET" and re.search("/(batches|files)/", path):
            self.away -= 1
            return 503, {"error": {"message": "away for a while"}}
        match method, path.partition("?")[0].strip("/").split("/")[1:]:
            case "POST", ["files"]:
                return 200, self._file(_uploaded(body))
            case "GET", ["files", id, "content"] if id in self.files:
                return 200, self.files[id]
            case "POST", ["batches"]:
                return self._make(json.loads(body))
            case "GET", ["batches"]:
                newest = sorted(self.batches.values(), key=lambda batch: -batch["created_at"])
                return 200, {"object": "list", "data": newest, "has_more": False}
            case "GET", ["batches", id] if id in self.batches:
                return 200, self._look(self.batches[id])
        return None

    def _file(self, content: bytes) -> dict[str, Any]:
        id = f"file-{len(self.files)}"
        self.files[id] = content
        return {"id": id, "object": "file", "bytes": len(content), "created_at": 0, "filename": "f", "purpose": "batch",
                "status": "processed"}  # fmt: skip

    def _make(self, body: dict[str, Any]) -> Reply:
        id = f"batch-{len(self.batches)}"
        self.batches[id] = {
            **body, "id": id, "object": "batch", "created_at": int(time.time()), "status": "in_progress",
            "looks": self.looks, "fate": self.fates.pop(0) if self.fates else "completed",
        }  # fmt: skip
        if self.broken:
            self.broken -= 1
            return 500, {"error": {"message": "lost on the way"}}
        return 200, self.batches[id]

    def _look(self, batch: dict[str, Any]) -> dict[str, Any]:
        batch["looks"] -= 1
        if batch["looks"] > 0 or batch["status"] != "in_progress":
            return batch
        batch["status"] = batch["fate"]
        if batch["fate"] == "failed":
            batch["errors"] = {"object": "list", "data": [{"code": "token_limit", "message": "too many tokens"}]}
            return batch
        lines = self.files[batch["input_file_id"]].splitlines()
        good, bad = [], []
        for line in lines[: len(lines) // 2] if batch["fate"] == "expired" else lines:
            request = json.loads(line)
            if self.omits(request["body"]):
                continue
            status, body = self.answer(request["body"])
            response = {"status_code": status, "request_id": "r", "body": body}
            result = {"id": "x", "custom_id": request["custom_id"], "response": response, "error": None}
            (good if status == 200 else bad).append(json.dumps(result))
        for key, results in (("output_file_id", good), ("error_file_id", bad)):
            if results:
                batch[key] = self._file("\n".join(results[::-1]).encode())["id"]
        return batch


def _uploaded(body: bytes) -> bytes:
    """The file in a multipart form."""
    boundary = body.partition(b"\r\n")[0]
    parts = body.split(boundary)[1:-1]
    file = next(part for part in parts if b"filename=" in part.partition(b"\r\n\r\n")[0])
    return file.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
