"""The HTTP side of an engine: OpenAI's API, health, metrics, and the web page."""

import functools
from collections.abc import Callable, Collection
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from openai.types import Completion
from openai.types.chat import ChatCompletion
from prometheus_client import CONTENT_TYPE_LATEST
from pydantic import BaseModel
from starlette.middleware.cors import CORSMiddleware

from llava_jax.inference.engine import Engine
from llava_jax.serve import errors
from llava_jax.serve.bodies import BoundedRoute
from llava_jax.serve.completions import Completions
from llava_jax.serve.gate import Gate, Traffic
from llava_jax.serve.hosts import Hosts
from llava_jax.serve.images import ImageReader
from llava_jax.serve.log import HEADER, Log
from llava_jax.serve.metrics import Metrics
from llava_jax.serve.models import AdapterDirectory, Card, Models
from llava_jax.serve.page import mount as mount_page
from llava_jax.serve.schema import LoadRequest, UnloadRequest

MAX_BODY_BYTES = 32 << 20
REFUSALS = (400, 401, 403, 404, 408, 413, 414, 421, 429, 431, 500, 503)
MAX_BODIES = 8  # of the largest size in memory at a time
BEYOND_QUEUE = 32  # requests whose images may be decoded, besides those that the engine holds


class ModelList(BaseModel):
    object: str = "list"
    data: list[Card]


class TokenizeResponse(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class DetokenizeResponse(BaseModel):
    prompt: str


class Health(BaseModel):
    status: str


def create_app(
    engine: Engine,
    model: str,
    *,
    api_key: str | None = None,
    allow_remote_images: bool = False,
    image_hosts: Collection[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
    allowed_hosts: Collection[str] = (),
    allow_origins: Collection[str] = (),
    page: bool = False,
    adapter_directory: AdapterDirectory | None = None,
) -> FastAPI:
    """The API of `engine`, which may still be warming up. `app.state` has its `traffic` and `metrics`.

    Args:
      engine: generates the answers.
      model: the name that clients use for the model.
      api_key: the bearer token that clients need; None accepts all clients.
      allow_remote_images: whether images are fetched from http(s) URLs.
      image_hosts: from which alone they are fetched; all if there are none.
      max_body_bytes: of a request.
      allowed_hosts: names of this server besides loopback names and the address that a client connects to.
      allow_origins: other sites whose pages may use the API from a browser.
      page: whether to serve the web page at `/`.
      adapter_directory: from which clients may load adapters; None if they may neither load nor unload any.
    """
    about = "OpenAI's chat completions, completions and responses, answered by a LLaVA."
    app = FastAPI(title="llava_jax", description=about, docs_url=None, redoc_url=None)  # both load scripts from a CDN
    app.router.redirect_slashes = False  # behind a TLS proxy it would redirect to http
    errors.install(app)
    metrics = app.state.metrics = Metrics(engine)
    traffic = app.state.traffic = Traffic(engine.capacity + BEYOND_QUEUE, MAX_BODIES * max_body_bytes)

    def closed() -> str | None:
        if traffic.shutting_down:
            return "the server is shutting down"
        return None if engine.ready else "the server is warming up: try again later"

    app.add_middleware(Gate, traffic=traffic, closed=closed, api_key=api_key, max_body_bytes=max_body_bytes)
    if allow_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=allow_origins,
            allow_methods=["GET", "POST"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=[HEADER, "Retry-After"],
        )
    app.add_middleware(Hosts, names=allowed_hosts, origins=allow_origins)
    app.add_middleware(Log, responded=metrics.responded)
    models = Models(engine, model)
    answering = Completions(engine, models, metrics, ImageReader(allow_remote_images, image_hosts))
    refused = {status: {"model": errors.ErrorResponse} for status in REFUSALS}

    streamed = {200: {"description": "An answer, or with `stream` its events.", "content": {"text/event-stream": {}}}}

    post = functools.partial(_post, app)
    post("/v1/chat/completions", answering.chat_completions, refused | streamed, response_model=ChatCompletion)
    post("/v1/completions", answering.completions, refused | streamed, response_model=Completion)
    post("/v1/responses", answering.responses, refused | streamed, response_model=None)
    post("/tokenize", answering.tokenize, refused, response_model=TokenizeResponse)
    post("/detokenize", answering.detokenize, refused, response_model=DetokenizeResponse)

    @app.get("/v1/models", responses=refused, response_model_exclude_none=True)
    async def all_models() -> ModelList:
        return ModelList(data=models.cards())

    @app.get("/v1/models/{name:path}", responses=refused, response_model_exclude_none=True)
    async def one_model(name: str) -> Card:
        return models.card(name)

    if adapter_directory is not None:
        _add_loading(app, adapter_directory, refused)

    @app.get("/health", responses=refused | {503: {"model": Health}})
    async def health() -> Health:
        """200 after the warm-up, until the server shuts down."""
        if (reason := closed()) is not None:
            return JSONResponse({"status": reason}, 503)
        return Health(status="ok")

    @app.get("/metrics", response_class=Response, responses=refused)
    async def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE_LATEST)

    if page:
        mount_page(app, max_body_bytes)
    return app


def _add_loading(app: FastAPI, directory: AdapterDirectory, refused: dict) -> None:
    """Adds vLLM's routes that load and unload adapters."""

    async def load(body: LoadRequest, request: Request) -> Response:
        await directory.load(body.lora_name, body.lora_path)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")

    async def unload(body: UnloadRequest, request: Request) -> Response:
        await directory.unload(body.lora_name)
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    for endpoint in (load, unload):
        _post(app, f"/v1/{endpoint.__name__}_lora_adapter", endpoint, refused, response_class=PlainTextResponse)


def _post(app: FastAPI, path: str, endpoint: Callable, responses: dict, **options: Any) -> None:
    """Adds a route whose body is bounded."""
    options |= {"methods": ["POST"], "responses": responses, "route_class_override": BoundedRoute}
    app.router.add_api_route(path, endpoint, **options)
