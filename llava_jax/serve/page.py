"""The web page: static files, which use the API like any other client. The server stores nothing for them."""

import hashlib
from pathlib import Path

from fastapi import FastAPI, Request, Response
from starlette.types import ASGIApp

FOLDER = Path(__file__).with_name("static")
FILES = sorted([*FOLDER.iterdir(), FOLDER.parents[1] / "style/base.css"])  # the reports have the same base
TYPES = {  # `mimetypes` has different tables on different machines
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
# No policy creates trusted types: text cannot become markup. Files are revalidated each time, mostly with 304.
HEADERS = dict(line.split(": ", 1) for line in FOLDER.with_name("page_headers.txt").read_text().splitlines())


def mount(app: FastAPI, max_body_bytes: int) -> None:
    """Serves the page at `/` and its files under `/static/`.

    Args:
      app: gets the routes.
      max_body_bytes: of a request; the page refuses larger ones before it sends them.
    """
    for file in FILES:
        if file.suffix in TYPES:
            body = file.read_bytes().replace(b"{max_body_bytes}", str(max_body_bytes).encode())
            path = "/" if file.name == "index.html" else f"/static/{file.name}"
            app.add_route(path, _static(body, TYPES[file.suffix]), include_in_schema=False)


def _static(body: bytes, content_type: str) -> ASGIApp:
    headers = HEADERS | {"Content-Type": content_type, "ETag": f'"{hashlib.sha256(body).hexdigest()[:32]}"'}

    def respond(request: Request) -> Response:
        unchanged = headers["ETag"] in request.headers.get("If-None-Match", "")
        return Response(status_code=304, headers=headers) if unchanged else Response(body, headers=headers)

    return respond
