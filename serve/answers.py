"""What the server answers, as its OpenAPI schema documents it."""

from typing import Any, Literal

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel, Field

from encache.runtime.generator import Cost
from encache.serve.asking import Format, Limits
from encache.serve.desk import DeskLimits
from encache.serve.guard import LARGEST_BODY, is_open


class Problem(BaseModel):
    """What went wrong, in one sentence."""

    message: str
    type: str
    param: str | None
    code: str


class Refusal(BaseModel):
    """An error as OpenAI's clients read it."""

    error: Problem


class Picture(BaseModel):
    """One picture: its file in base64, or an address."""

    seed: int
    b64_json: str | None = None
    url: str | None = None


class Images(BaseModel):
    """The answer that OpenAI's client reads; `encache` is what each picture cost."""

    created: int
    data: list[Picture]
    output_format: Format
    size: str
    encache: Cost


class TextToImageAnswer(BaseModel):
    """The answer that web front ends read."""

    images: list[str] = Field(description="PNG files in base64.")
    parameters: dict[str, Any]
    info: str = Field(description="A JSON object: prompt, seed, all_seeds, encache.")


class Outline(BaseModel):
    """A policy's plan and cost."""

    model: str
    num_calls: int
    key_calls: list[int]
    stride: int | None
    blend: str
    full_rows: int
    evaluations: int
    rows: int
    decoder_rows: int


class Model(BaseModel):
    """A model that is served."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: Literal["encache"] = "encache"


class Models(BaseModel):
    """All of them: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Status(BaseModel):
    """Whether the server lives, or draws."""

    status: Literal["ok", "ready", "not ready"]


Documented = dict[int | str, dict[str, Any]]
_REFUSALS = {
    400: "The request cannot be drawn, or is no request; the message says why.",
    404: "There is no such thing here.",
    413: f"The body has more than {LARGEST_BODY} bytes.",
    429: "The queue is full.",
    500: "The server failed; its log says why.",
    504: "The picture was not ready in time.",
}
_HEADERS = {
    429: {"Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 1}}}
}


def _refusals(*statuses: int) -> Documented:
    return {
        one: {
            "description": _REFUSALS[one],
            "model": Refusal,
            **({"headers": _HEADERS[one]} if one in _HEADERS else {}),
        }
        for one in statuses
    }


#: Of the routes that take a body, and of those that draw too.
ASKED, DRAWN = _refusals(400, 413, 500), _refusals(400, 413, 429, 500, 504)
#: Of the route that names a model.
NAMED = DRAWN | _refusals(404)
#: Of a picture by its name.
FILES: Documented = {
    200: {
        "description": "The picture.",
        "content": {
            f"image/{one}": {"schema": {"type": "string", "format": "binary"}}
            for one in ("png", "jpeg", "webp")
        },
    },
    **_refusals(404),
}


#: Of whether the server draws.
READY: Documented = {503: {"description": "It does not draw.", "model": Status}}


def describe(limits: Limits, deadline: float, desk: DeskLimits) -> str:
    """What one server allows, in words."""
    return (
        f"At most {limits.images} pictures in a request, {limits.side} pixels a side, "
        f"{limits.steps} steps, {limits.prompt} characters of prompt and {LARGEST_BODY} bytes of "
        f"body. {desk.most_waiting} pictures may wait; a request ends after {deadline:g} seconds."
    )


def document(app: FastAPI, needs_token: bool) -> dict[str, Any]:
    """The OpenAPI schema: FastAPI's own, with the errors and the token as they are here."""
    schema = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes
    )
    for path in schema["paths"].values():
        for operation in path.values():
            operation["responses"].pop("422", None)  # what is invalid is a 400 here
    for name in ("HTTPValidationError", "ValidationError"):
        schema["components"]["schemas"].pop(name, None)
    if needs_token:
        refused = {"description": "The token is missing or another."}
        for path, operations in schema["paths"].items():
            if not is_open(path):
                for operation in operations.values():
                    operation["responses"]["401"] = refused
                    operation["security"] = [{"token": []}]
        schema["components"]["securitySchemes"] = {"token": {"type": "http", "scheme": "bearer"}}
    return schema
