"""`/v1/embeddings`: texts or token ids in, pooled vectors out."""

from __future__ import annotations

import asyncio
import base64
import struct

from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.request import EmbeddingOutput
from jaxserve.server.openai import Embedding, EmbeddingRequest, Embeddings, EmbeddingUsage
from jaxserve.server.prompt import text_prompts
from jaxserve.server.state import Exchange
from jaxserve.server.wire import json_response


async def embeddings(exchange: Exchange, body: EmbeddingRequest) -> Response:
    """Handles `POST /v1/embeddings`."""
    server = exchange.server
    model = server.check_model(body.model)

    def work() -> list[EmbeddingOutput]:
        prompts = text_prompts(server, body.input, body.add_special_tokens, "input")
        server.check_choices(len(prompts), 1)
        return server.llm.embed([p.token_ids for p in prompts], pooling=body.pooling)

    found = await asyncio.get_running_loop().run_in_executor(server.workers, work)
    _check_dimensions(body.dimensions, found)
    tokens = sum(len(output.prompt_token_ids) for output in found)
    answer = Embeddings(
        data=[
            Embedding(index=i, embedding=_encoded(output.embedding, body.encoding_format))
            for i, output in enumerate(found)
        ],
        model=model,
        usage=EmbeddingUsage(prompt_tokens=tokens, total_tokens=tokens),
    )
    return json_response(answer)


def _check_dimensions(wanted: int | None, found: list[EmbeddingOutput]) -> None:
    width = len(found[0].embedding)
    if wanted is not None and wanted != width:
        raise RequestError(
            f"dimensions={wanted} cannot be honoured: the model's vectors have {width}; remove it",
            "dimensions",
        )


def _encoded(vector: list[float], form: str | None) -> list[float] | str:
    if form != "base64":
        return vector
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
