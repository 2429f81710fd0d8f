"""A Hugging Face Hub in memory: the three addresses that `snapshot_download` uses, and what can go wrong at them."""

import hashlib
import json
import math
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class FakeHub:
    """Serves directories as repositories on `url` within `with`.

    Attributes:
      repositories: name -> directory.
      commit: of all of them, on the branch `main`.
      gated: names that need a token.
      token: the one that opens them.
      cut: file name -> how many bytes of it are sent before the connection breaks, the next time that it is asked for.
      files: how many are sent, by default all; after these the server refuses.
      sent: (file name, first byte) of every answer with a file's content.
    """

    def __init__(self):
        self.repositories: dict[str, Path] = {}
        self.commit = "0123456789abcdef0123456789abcdef01234567"
        self.gated: set[str] = set()
        self.token = "hf_secret"
        self.cut: dict[str, int] = {}
        self.files = math.inf
        self.sent: list[tuple[str, int]] = []
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("localhost", 0), handler)
        self.url = f"http://localhost:{self.server.server_port}"

    def __enter__(self) -> "FakeHub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            name, kind, revision = "/".join(parts[2:4]), parts[4], parts[5]
        else:
            name, kind, revision = "/".join(parts[:2]), "file", parts[3]
        directory = self.hub.repositories.get(name)
        if directory is None:
            return self.fail(HTTPStatus.NOT_FOUND, "RepoNotFound")
        allowed = self.headers.get("Authorization") == f"Bearer {self.hub.token}"
        if name in self.hub.gated and not allowed and kind == "file":
            return self.fail(
                HTTPStatus.FORBIDDEN if "Authorization" in self.headers else HTTPStatus.UNAUTHORIZED, "GatedRepo"
            )
        if revision not in ("main", self.hub.commit):
            return self.fail(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        if kind == "revision":
            return self.answer({"id": name, "sha": self.hub.commit, "siblings": [], "tags": [], "private": False})
        if kind == "tree":
            files = [file for file in sorted(directory.iterdir()) if file.is_file()]
            return self.answer(
                [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": oid(f)} for f in files]
            )
        return self.file(directory / parts[4])

    def file(self, file: Path) -> None:
        if len(self.hub.sent) >= self.hub.files:
            return self.fail(HTTPStatus.FORBIDDEN, "")
        data = file.read_bytes()
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])
        self.send_response(HTTPStatus.PARTIAL_CONTENT if start else HTTPStatus.OK)
        self.send_header("Content-Length", str(len(data) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{oid(file)}"')
        self.send_header("X-Repo-Commit", self.hub.commit)
        self.end_headers()
        if self.command == "GET":
            self.hub.sent.append((file.name, start))
            end = self.hub.cut.pop(file.name, len(data))
            self.wfile.write(data[start:end])
            self.close_connection = end < len(data)

    def answer(self, values: object) -> None:
        data = json.dumps(values).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def fail(self, status: HTTPStatus, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def oid(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
