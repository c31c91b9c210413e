"""The OpenAPI document, from the dataclasses that requests are read into and answers are written from."""

from collections.abc import Collection
from typing import Any

from ... import __version__
from .answers import (
    ChatAnswer,
    CompletionAnswer,
    DetokenizeAnswer,
    ErrorAnswer,
    Health,
    Model,
    ModelList,
    TokenizeAnswer,
)
from .chat import ChatRequest
from .completions import CompletionRequest, DetokenizeRequest, TokenizeRequest
from .reading import schema
from .responses import ResponseAnswer, ResponseRequest

ERRORS = {
    400: "The request is not as it must be: `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The request names another host than this server's.",
    404: "There is no such model.",
    408: "The head or the body did not come in time.",
    413: "The body is too large.",
    415: "The body is no JSON by its type, or compressed.",
    429: "As many requests wait, or bytes of requests are under way, as may: `Retry-After` says when to come again.",
    431: "The head is too large.",
    500: "The request failed.",
    503: "The model is being loaded or lost, or the server stops.",
    504: "The answer took longer than the server allows.",
}
POSTED = {
    "/v1/chat/completions": ("chat", "Continue a conversation.", ChatRequest, ChatAnswer),
    "/v1/completions": ("complete", "Continue prompts.", CompletionRequest, CompletionAnswer),
    "/v1/responses": ("respond", "Continue a conversation of items.", ResponseRequest, ResponseAnswer),
    "/tokenize": ("tokenize", "Read a text or a conversation into tokens.", TokenizeRequest, TokenizeAnswer),
    "/detokenize": ("detokenize", "Write tokens as text.", DetokenizeRequest, DetokenizeAnswer),
}
STREAMED = ("/v1/chat/completions", "/v1/completions", "/v1/responses")


def document(name: str, opened: Collection[str] | None = None) -> dict[str, Any]:
    """The document of a server.

    Args:
        name: The model's name.
        opened: Paths that need no API key; None where none is asked for.
    """
    components: dict[str, Any] = {}
    paths = {**_posted(components), **_got(components, name)}
    found: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Arriero", "version": __version__, "description": f"The model {name}, served."},
        "paths": paths,
        "components": {"schemas": dict(sorted(components.items()))},
    }
    if opened is not None:
        found["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        found["security"] = [{"key": []}]
        for path in paths.keys() & set(opened):
            paths[path]["get"]["security"] = []
    return found


def _posted(components: dict[str, Any]) -> dict[str, Any]:
    """The paths that something is sent to."""
    paths: dict[str, Any] = {}
    for path, (operation, about, asked, answered) in POSTED.items():
        content = {"application/json": {"schema": schema(answered, components)}}
        if path in STREAMED:
            content["text/event-stream"] = {"schema": {"type": "string"}}
        paths[path] = {
            "post": {
                "operationId": operation,
                "summary": about,
                "requestBody": {
                    "required": True,
                    "content": {"application/json": {"schema": schema(asked, components)}},
                },
                "responses": {
                    "200": {"description": "The answer.", "content": content},
                    **_errors(components, *ERRORS),
                },
            }
        }
    return paths


def _got(components: dict[str, Any], name: str) -> dict[str, Any]:
    """The paths that are asked alone."""
    paths: dict[str, Any] = {}
    paths["/v1/models"] = {"get": _get("models", "List the one model.", ModelList, components, 401, 403, 503)}
    paths["/v1/models/{name}"] = {
        "get": {
            **_get("model", "Describe a model.", Model, components, 401, 403, 404, 503),
            "parameters": [
                {"name": "name", "in": "path", "required": True, "schema": {"type": "string"}, "example": name}
            ],
        }
    }
    health = {"content": {"application/json": {"schema": schema(Health, components)}}}
    paths["/health"] = {"get": _get("health", "Say that all is well.", Health, components, 403)}
    paths["/ready"] = {"get": _get("ready", "Say whether requests are taken.", Health, components, 403)}
    paths["/health"]["get"]["responses"]["503"] = {"description": "The model is lost: `reason` says why.", **health}
    paths["/ready"]["get"]["responses"]["503"] = {"description": "They are not taken now.", **health}
    paths["/metrics"] = {
        "get": {
            "operationId": "metrics",
            "summary": "Give counts in Prometheus's text.",
            "responses": {
                "200": {"description": "The counts.", "content": {"text/plain": {"schema": {"type": "string"}}}},
                **_errors(components, 401, 403),
            },
        }
    }
    return paths


def _get(operation: str, about: str, answered: type, components: dict[str, Any], *errors: int) -> dict[str, Any]:
    content = {"application/json": {"schema": schema(answered, components)}}
    return {
        "operationId": operation,
        "summary": about,
        "responses": {"200": {"description": "The answer.", "content": content}, **_errors(components, *errors)},
    }


def _errors(components: dict[str, Any], *statuses: int) -> dict[str, Any]:
    content = {"application/json": {"schema": schema(ErrorAnswer, components)}}
    found: dict[str, Any] = {str(status): {"description": ERRORS[status], "content": content} for status in statuses}
    if "429" in found:
        found["429"]["headers"] = {"Retry-After": {"schema": {"type": "string"}}}
    return found
