"""The HTTP side of an engine: OpenAI's API, health, metrics, and the web page."""

import time

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from openai.types import Model
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel

from llava_jax.serve import errors
from llava_jax.serve.completions import Chat, unknown_model
from llava_jax.serve.engine import Engine
from llava_jax.serve.gate import Gate, Traffic
from llava_jax.serve.metrics import CountResponses, Metrics
from llava_jax.serve.page import mount as mount_page
from llava_jax.serve.pictures import Reader
from llava_jax.serve.schema import ChatRequest

MAX_BODY_BYTES = 32 << 20
BODIES = 8  # of the largest size that may be in memory at a time
BEYOND_QUEUE = 32  # requests at a time, over those that the engine holds, that may read, decode or be refused


class ModelList(BaseModel):
    object: str = "list"
    data: list[Model]


class Health(BaseModel):
    status: str


def create_app(
    engine: Engine,
    model: str,
    *,
    api_key: str | None = None,
    allow_remote_images: bool = False,
    max_body_bytes: int = MAX_BODY_BYTES,
    page: bool = False,
) -> FastAPI:
    """The API of `engine`, which may still be warming up. `app.state` has its `traffic` and `metrics`.

    Args:
      engine: what answers.
      model: the name that it is served under.
      api_key: what clients have to send as a bearer token; None lets everyone in.
      allow_remote_images: whether http(s) URLs of pictures are fetched.
      max_body_bytes: of a request.
      page: whether the web page is served at `/`.
    """
    app = FastAPI(title="llava_jax", description="OpenAI's chat completions, answered by a LLaVA.")
    errors.install(app)
    metrics = app.state.metrics = Metrics(engine)
    traffic = app.state.traffic = Traffic(engine.capacity + BEYOND_QUEUE, BODIES * max_body_bytes)

    def closed() -> str | None:
        if traffic.shutting_down:
            return "the server is shutting down"
        return None if engine.ready else "the server is warming up: try again later"

    app.add_middleware(Gate, traffic=traffic, closed=closed, api_key=api_key, max_body_bytes=max_body_bytes)
    app.add_middleware(CountResponses, metrics=metrics)
    reader = Reader.of(engine.config, allow_remote_images)
    chat = Chat(engine, model, metrics, reader)
    card = Model(id=model, created=int(time.time()), object="model", owned_by="llava_jax")
    refused = {status: {"model": errors.ErrorResponse} for status in (400, 401, 404, 408, 413, 429, 500, 503)}

    streamed = {200: {"description": "An answer, or with `stream` its events.", "content": {"text/event-stream": {}}}}

    @app.post("/v1/chat/completions", responses=refused | streamed, response_model=ChatCompletion)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        return await chat.respond(body, request)

    @app.get("/v1/models", responses={401: refused[401]})
    async def models() -> ModelList:
        return ModelList(data=[card])

    @app.get("/v1/models/{name:path}", responses={401: refused[401], 404: refused[404]})
    async def one_model(name: str) -> Model:
        if name != model:
            raise unknown_model(name, model)
        return card

    @app.get("/health", responses={503: {"model": Health}})
    async def health() -> Health:
        """200 once an answer takes no compilation any more, and until the server shuts down."""
        if (reason := closed()) is not None:
            return JSONResponse({"status": reason}, 503)
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, responses={401: refused[401]})
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    if page:
        mount_page(app, max_body_bytes)
    return app
