"""The document describes the server: schemathesis finds no 5xx and no answer it does not allow."""

import json

import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from jaxserve.server.app import ENDPOINTS, create_app
from tests.jaxserve.server.fake_llm import FakeLLM

schema = schemathesis.openapi.from_asgi("/openapi.json", create_app(FakeLLM()))


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]
SETTINGS = settings(
    deadline=None, derandomize=True, suppress_health_check=list(HealthCheck), database=None
)


@schema.parametrize()
@settings(SETTINGS, max_examples=20, phases=[Phase.generate])
def test_no_5xx_and_answers_as_documented(case):
    case.call_and_validate(checks=CHECKS)


@pytest.mark.slow
@schema.parametrize()
@settings(SETTINGS, max_examples=200, phases=[Phase.explicit, Phase.generate])
def test_no_5xx_at_every_boundary(case):
    case.call_and_validate(checks=CHECKS)


def test_every_route_and_struct_is_described():
    document = schema.raw_schema
    described = {p.replace("{id}", "{id:path}") for p in document["paths"]}
    assert described == {e.path for e in ENDPOINTS}
    names = document["components"]["schemas"].keys()
    assert not [name for name in names if "." in name], "two structs have the same name"
    chat = document["components"]["schemas"]["ChatRequest"]
    assert chat["additionalProperties"] is False
    assert chat["required"] == ["messages"]
    assert "$ref" in json.dumps(document["paths"]["/v1/chat/completions"])


@pytest.mark.parametrize("endpoint", ENDPOINTS, ids=lambda e: e.path)
def test_every_handler_says_what_it_handles(endpoint):
    path = endpoint.path.replace(":path", "")
    assert f"Handles `{endpoint.method} {path}`" in (endpoint.handler.__doc__ or "")
