"""`/v1/embeddings`: texts or token ids in, pooled vectors out."""

from __future__ import annotations

import base64
import struct

from starlette.responses import Response

from jaxserve.errors import RequestError
from jaxserve.request import EmbeddingOutput, SamplingParams
from jaxserve.server.openai import Embedding, EmbeddingRequest, Embeddings, EmbeddingUsage
from jaxserve.server.prompt import text_prompts
from jaxserve.server.state import Exchange
from jaxserve.server.turn import Prompt, begin
from jaxserve.server.wire import json_response


async def embeddings(exchange: Exchange, body: EmbeddingRequest) -> Response:
    """Handles `POST /v1/embeddings`."""
    server = exchange.server
    model = server.check_model(body.model)

    def prepare() -> list[Prompt]:
        prompts = text_prompts(server, body.input, body.add_special_tokens, "input")
        server.check_choices(len(prompts), 1)
        return prompts

    turn = await begin(exchange, prepare, SamplingParams(), pooling=body.pooling or "last")
    await turn.answers()
    found = [g.embedding for g in turn.generations if g.embedding is not None]
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
