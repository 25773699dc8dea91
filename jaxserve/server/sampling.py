"""The sampling fields that every generating route shares, and what they become."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta, Struct

from jaxserve.errors import RequestError
from jaxserve.request import SamplingParams, StructuredOutputs
from jaxserve.server.wire import Body, Count, TokenId

Stop = str | list[str]
Positive = Annotated[int, Meta(ge=1, le=2**31 - 1)]
Schema = dict[str, Any] | str


class StructuredOutputsField(Struct, kw_only=True, forbid_unknown_fields=True):
    """vLLM's `structured_outputs`: exactly one field."""

    json: Schema | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None


class SamplingBody(Body, kw_only=True):
    """Fields that change what is sampled; None leaves the default of `SamplingParams`."""

    n: Annotated[int, Meta(ge=1, le=1024)] | None = None
    temperature: Annotated[float, Meta(ge=0, le=100)] | None = None
    top_p: Annotated[float, Meta(gt=0, le=1)] | None = None
    top_k: Annotated[int, Meta(ge=-1, le=2**31 - 1)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    seed: Annotated[int, Meta(ge=-(2**63), le=2**63 - 1)] | None = None
    stop: Stop | None = None
    stop_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: bool | None = None
    min_tokens: Count | None = None
    logit_bias: dict[TokenId, Annotated[float, Meta(ge=-1e6, le=1e6)]] | None = None
    presence_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Meta(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Meta(gt=0, le=100)] | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    structured_outputs: StructuredOutputsField | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    guided_grammar: str | None = None

    def sampling_params(
        self, constraint: StructuredOutputs | None = None, **known: Any
    ) -> SamplingParams:
        """These fields as the engine's parameters.

        Args:
            constraint: what the protocol's own fields ask for (`response_format`, tools).
            known: parameters that this protocol names differently; None leaves the default.
        """
        given = {name: getattr(self, name) for name in _COPIED} | known
        given["structured_outputs"] = _only_one(self, constraint)
        return SamplingParams(**{k: v for k, v in given.items() if v is not None})


_COPIED = [
    name
    for name in SamplingBody.__struct_fields__
    if not name.startswith("guided_") and name != "structured_outputs"
]


_CONSTRAINTS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar")
_CONSTRAINTS += ("response_format", "structured_outputs", "text", "tools")


def constraint_field(body: object) -> str:
    """The field that constrained the output, as this client spelled it."""
    given = (name for name in _CONSTRAINTS if getattr(body, name, None) is not None)
    return next(given, "structured_outputs")


def _only_one(body: SamplingBody, constraint: StructuredOutputs | None) -> StructuredOutputs | None:
    """The one constraint of a request; two of them would be ambiguous."""
    found: list[tuple[str, StructuredOutputs]] = []
    if constraint is not None:
        found.append(("response_format or tool_choice", constraint))
    if (given := body.structured_outputs) is not None:
        fields = {name: getattr(given, name) for name in given.__struct_fields__}
        fields["json_object"] = bool(fields["json_object"])
        found.append(("structured_outputs", StructuredOutputs(**_checked(fields))))
    for name in ("json", "regex", "choice", "grammar"):
        if (value := getattr(body, f"guided_{name}")) is not None:
            checked = _checked({name: value}, f"guided_{name}")
            found.append((f"guided_{name}", StructuredOutputs(**checked)))
    if len(found) > 1:
        names = " and ".join(name for name, _ in found)
        raise RequestError(f"{names} both constrain the output; send one", found[-1][0])
    return found[0][1] if found else None


def _checked(fields: dict[str, Any], param: str = "structured_outputs") -> dict[str, Any]:
    """The fields, none of them empty: an empty constraint would silently be no constraint."""
    for name, value in fields.items():
        if value is not None and value is not False and not value and value != {}:
            raise RequestError(f"{param}: {name} is empty; give it a value or remove it", param)
    if fields.get("json") == {}:  # the empty schema allows any JSON
        fields["json"] = "{}"
    return fields
