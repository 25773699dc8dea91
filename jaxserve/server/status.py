"""What operators ask: models, health, load, version, metrics."""

from __future__ import annotations

from msgspec import Struct
from starlette.responses import Response

from jaxserve import __version__
from jaxserve.server.errors import ApiError
from jaxserve.server.openai import Model, Models
from jaxserve.server.state import Exchange, Server
from jaxserve.server.wire import json_response


class Health(Struct, kw_only=True):
    """The answer of `/health`."""

    status: str = "ok"


class Load(Struct, kw_only=True):
    """The answer of `/load`."""

    server_load: int  # requests inside the server, vLLM's name
    num_running: int
    num_waiting: int
    free_pages: int
    pages: int


class Version(Struct, kw_only=True):
    """The answer of `/version`."""

    version: str


async def models(exchange: Exchange, _body: None) -> Response:
    """Handles `GET /v1/models`."""
    server = exchange.server
    return json_response(Models(data=[_model(server, name) for name in server.names]))


async def model(exchange: Exchange, _body: None) -> Response:
    """Handles `GET /v1/models/{id}`."""
    server = exchange.server
    return json_response(_model(server, server.check_model(exchange.request.path_params["id"])))


def _model(server: Server, name: str) -> Model:
    llm = server.llm
    return Model(
        id=name, created=server.created, max_model_len=llm.max_model_len, root=llm.model_name
    )


async def health(exchange: Exchange, _body: None) -> Response:
    """Handles `GET /health`: 503 while draining, and once the engine cannot go on."""
    if exchange.server.gate.draining:
        raise ApiError(503, "the server is shutting down", code="draining")
    exchange.server.llm.stats()  # raises EngineError if the engine is gone
    return json_response(Health())


async def load(exchange: Exchange, _body: None) -> Response:
    """Handles `GET /load`."""
    stats = exchange.server.llm.stats()
    return json_response(
        Load(
            server_load=exchange.server.gate.running,
            num_running=stats.num_running,
            num_waiting=stats.num_waiting,
            free_pages=stats.num_free_pages,
            pages=stats.num_pages,
        )
    )


async def show_version(_exchange: Exchange, _body: None) -> Response:
    """Handles `GET /version`."""
    return json_response(Version(version=__version__))


async def metrics(exchange: Exchange, _body: None) -> Response:
    """Handles `GET /metrics`."""
    found = exchange.server.metrics
    return Response(found.render(), media_type=found.content_type)
