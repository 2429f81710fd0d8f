"""A Google Cloud Storage in memory, with as much of its JSON API as gcsfs, google-cloud-storage and TensorStore use.

One flat table of objects with generations and preconditions: no directories, no renames, no appends.
"""

import itertools
import json
import re
import sys
import threading
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"/(?:download/)?storage/v1/b/(?P<bucket>[^/]+)/o/(?P<name>[^/]+)")
LISTING = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)/o")
BUCKET = re.compile(r"/storage/v1/b/(?P<bucket>[^/]+)(/storageLayout)?")
UPLOAD = re.compile(r"/(?:resumable/)?upload/storage/v1/b/(?P<bucket>[^/]+)/o")
COPY = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/(?:rewriteTo|copyTo)/b/([^/]+)/o/([^/]+)")

MOVE = re.compile(r"/storage/v1/b/([^/]+)/o/([^/]+)/moveTo/o/([^/]+)")


class Stored(NamedTuple):
    data: bytes
    generation: int


class FakeGcs:
    """Serves on `url` within `with`; `objects` maps (bucket, name) to what is stored."""

    def __init__(self):
        self.objects: dict[tuple[str, str], Stored] = {}
        self.uploads: dict[str, tuple[str, str, bytearray]] = {}
        self.generations = itertools.count(1)
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"store": self})
        self.server = _Server(("localhost", 0), handler)
        self.url = f"http://localhost:{self.server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What makes the clients of another process come here."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "FSSPEC_GCS_TOKEN": "anon",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # buckets with directories, which this is not
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
            "GOOGLE_CLOUD_PROJECT": "none",
        }

    def __enter__(self) -> "FakeGcs":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        self.server.shutdown()
        self.server.server_close()

    def put(self, bucket: str, name: str, data: bytes) -> dict:
        with self.lock:
            self.objects[bucket, name] = Stored(bytes(data), next(self.generations))
            return self.describe(bucket, name)

    def describe(self, bucket: str, name: str) -> dict:
        stored = self.objects[bucket, name]
        return {
            "kind": "storage#object",
            "id": f"{bucket}/{name}/{stored.generation}",
            "bucket": bucket,
            "name": name,
            "size": str(len(stored.data)),
            "generation": str(stored.generation),
            "metageneration": "1",
            "contentType": "application/octet-stream",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def names(self, bucket: str) -> list[str]:
        return sorted(name for held, name in self.objects if held == bucket)

    def read(self, bucket: str, name: str) -> bytes:
        return self.objects[bucket, name].data


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # of a client that ended
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    store: FakeGcs
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        path, query = self._target()
        with self.store.lock:
            if match := OBJECT.fullmatch(path):
                self._get(match["bucket"], unquote(match["name"]), query)
            elif match := LISTING.fullmatch(path):
                self._json(self._list(match["bucket"], query))
            elif match := BUCKET.fullmatch(path):
                self._json({"kind": "storage#bucket", "name": match["bucket"], "id": match["bucket"]})
            else:
                self._answer(HTTPStatus.NOT_FOUND, path.encode())

    def do_POST(self) -> None:
        path, query = self._target()
        body = self._body()
        with self.store.lock:
            if path == "/batch/storage/v1":
                self._batch(body)
            elif match := COPY.fullmatch(path):
                bucket, name, *target = map(unquote, match.groups())
                self._copy((bucket, name), tuple(target))
            elif match := MOVE.fullmatch(path):
                bucket, name, target = map(unquote, match.groups())
                self._copy((bucket, name), (bucket, target), move=True)
            elif "upload_id" in query:
                self._piece(query["upload_id"], body)
            elif match := UPLOAD.fullmatch(path):
                self._upload(match["bucket"], query, body)
            else:
                self._answer(HTTPStatus.NOT_FOUND, path.encode())

    def do_DELETE(self) -> None:
        path, query = self._target()
        match = OBJECT.fullmatch(path)
        with self.store.lock:
            key = match["bucket"], unquote(match["name"])
            if self._refused(key, query):
                return
            found = self.store.objects.pop(key, None)
            self._answer(HTTPStatus.NO_CONTENT if found else HTTPStatus.NOT_FOUND)

    # ------------------------------------------------------------------------------------------------ operations

    def _get(self, bucket: str, name: str, query: dict[str, str]) -> None:
        stored = self.store.objects.get((bucket, name))
        if stored is None:
            self._answer(HTTPStatus.NOT_FOUND, b"{}")
        elif query.get("ifGenerationNotMatch") == str(stored.generation):
            self._answer(HTTPStatus.NOT_MODIFIED)
        elif self._refused((bucket, name), query):
            return
        elif query.get("alt") != "media":
            self._json(self.store.describe(bucket, name))
        else:
            self._media(stored)

    def _media(self, stored: Stored) -> None:
        headers = {"x-goog-generation": str(stored.generation), "x-goog-stored-content-length": str(len(stored.data))}
        piece = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not piece:
            self._answer(HTTPStatus.OK, stored.data, headers)
            return
        size = len(stored.data)
        start = int(piece[1]) if piece[1] else max(0, size - int(piece[2]))
        stop = min(int(piece[2]) + 1, size) if piece[1] and piece[2] else size
        if start >= size:
            self._answer(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            return
        headers["Content-Range"] = f"bytes {start}-{stop - 1}/{size}"
        self._answer(HTTPStatus.PARTIAL_CONTENT, stored.data[start:stop], headers)

    def _list(self, bucket: str, query: dict[str, str]) -> dict:
        """All in one page."""
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in self.store.names(bucket):
            inside = name.startswith(prefix) and name >= query.get("startOffset", "")
            if not inside or ("endOffset" in query and name >= query["endOffset"]):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(self.store.describe(bucket, name))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}

    def _upload(self, bucket: str, query: dict[str, str], body: bytes) -> None:
        if query["uploadType"] == "media":
            if not self._refused((bucket, query["name"]), query):
                self._json(self.store.put(bucket, query["name"], body))
        elif query["uploadType"] == "multipart":
            about, data = _parts(self.headers["Content-Type"], body)
            self._json(self.store.put(bucket, json.loads(about)["name"], data))
        else:
            name = query.get("name") or json.loads(body)["name"]
            upload_id = str(next(self.store.generations))
            self.store.uploads[upload_id] = (bucket, name, bytearray())
            place = f"{self.store.url}/upload/storage/v1/b/{bucket}/o?uploadType=resumable&upload_id={upload_id}"
            self._answer(HTTPStatus.OK, headers={"Location": place})

    def _copy(self, source: tuple[str, str], target: tuple[str, str], move: bool = False) -> None:
        stored = self.store.objects.get(source)
        if stored is None:
            self._answer(HTTPStatus.NOT_FOUND, b"{}")
            return
        described = self.store.put(*target, stored.data)
        if move:
            del self.store.objects[source]
        self._json(described if move else {"kind": "storage#rewriteResponse", "done": True, "resource": described})

    def _piece(self, upload_id: str, body: bytes) -> None:
        """A piece of a resumable upload: `Content-Range: bytes 0-99/100`, with `*` for 100 while more is to come."""
        bucket, name, data = self.store.uploads[upload_id]
        data += body
        if self.headers["Content-Range"].endswith("/*"):
            self._answer(HTTPStatus.PERMANENT_REDIRECT, headers={"Range": f"bytes=0-{len(data) - 1}"})
        else:
            self._json(self.store.put(bucket, name, data))

    def _batch(self, body: bytes) -> None:
        """Deletions, which is what batches are used for."""
        answers = []
        for part in _parts(self.headers["Content-Type"], body):
            match = re.match(r"DELETE /storage/v1/b/([^/]+)/o/(\S+) HTTP", part.decode())
            found = self.store.objects.pop((match[1], unquote(match[2])), None)
            status = "204 No Content" if found else "404 Not Found"
            answers.append(f"--answer\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 {status}\r\n\r\n\r\n")
        data = ("".join(answers) + "--answer--\r\n").encode()
        self._answer(HTTPStatus.OK, data, {"Content-Type": "multipart/mixed; boundary=answer"})

    def _refused(self, key: tuple[str, str], query: dict[str, str]) -> bool:
        """Answers 412 where the object is not of the generation that the client goes by (0: there is none)."""
        wanted = query.get("ifGenerationMatch")
        stored = self.store.objects.get(key)
        if wanted is None or wanted == str(stored.generation if stored else 0):
            return False
        self._answer(HTTPStatus.PRECONDITION_FAILED)
        return True

    # ------------------------------------------------------------------------------------------------ HTTP

    def _target(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        return parts.path, {key: values[-1] for key, values in parse_qs(parts.query).items()}

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        pieces = []
        while size := int(self.rfile.readline().strip(), 16):
            pieces.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(pieces)

    def _json(self, value: dict) -> None:
        self._answer(HTTPStatus.OK, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: HTTPStatus, data: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if status not in (HTTPStatus.NO_CONTENT, HTTPStatus.NOT_MODIFIED):
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        self.wfile.flush()


def _parts(content_type: str, body: bytes) -> list[bytes]:
    """The bodies of a multipart message."""
    boundary = re.search(r'boundary="?([^";]+)', content_type)[1].encode()
    pieces = body.split(b"--" + boundary)[1:-1]
    # Each stands between `\n` (or `\r\n`) and `\n--boundary`; its header ends at the first empty line.
    return [re.split(rb"\r?\n\r?\n", piece, maxsplit=1)[1][:-1] for piece in pieces]
