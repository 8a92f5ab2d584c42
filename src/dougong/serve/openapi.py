"""The description of the interface that programs read, made from the models that are served.

Here        describe.
Elsewhere   the routes themselves (app.py).
Promise     it lists every status that a route answers with, and each model's columns with their types.
"""

from __future__ import annotations

from importlib.metadata import version
from typing import Any, Final

from dougong.data.columns import MEDIA
from dougong.serve.columns import Column
from dougong.serve.models import Models

VERSION: Final = version("dougong")

_ERROR = {
    "description": "Why not, in one line.",
    "content": {
        "application/json": {
            "schema": {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
        }
    },
}
_JSON = {"description": "Done.", "content": {"application/json": {"schema": {"type": "object"}}}}
_DRAWN = {
    "type": "object",
    "required": ["text"],
    "additionalProperties": False,
    "properties": {
        "text": {"type": "string", "minLength": 1},
        "seed": {"type": "integer"},
        "temperature": {"type": "number", "minimum": 0},
        "top_k": {"type": ["integer", "null"], "minimum": 1},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "guidance": {"type": "number", "minimum": 0},
    },
}


def describe(models: Models, *, keys: bool) -> dict[str, Any]:
    """An OpenAPI 3.1 document."""
    names = models.names
    of_model = {"name": "name", "in": "path", "required": True, "schema": {"type": "string", "enum": names or ["none"]}}
    of_version = {
        "name": "version",
        "in": "path",
        "required": True,
        "schema": {"type": "string", "enum": sorted({each.version for each in models.all}) or ["none"]},
    }
    query = [
        {
            "name": "model",
            "in": "query",
            "schema": {"type": "string"},
            "description": "Needed where several are served.",
        },
        {"name": "version", "in": "query", "schema": {"type": "string"}},
        {"name": "explain", "in": "query", "schema": {"type": "boolean"}, "description": "Add attention. Slower."},
        {
            "name": "X-Deadline-Ms",
            "in": "header",
            "schema": {"type": "integer", "minimum": 1},
            "description": "Refuse at once if it cannot be answered within this.",
        },
        {"name": "X-Priority", "in": "header", "schema": {"type": "string", "enum": ["low", "normal", "high"]}},
        {"name": "X-Request-Id", "in": "header", "schema": {"type": "string", "pattern": "^[A-Za-z0-9_.-]{1,64}$"}},
    ]
    record = _record(models)
    predict = {
        "summary": "Answer a record, or several.",
        "parameters": query,
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "anyOf": [
                            record(files=False),
                            {
                                "type": "object",
                                "required": ["records"],
                                "additionalProperties": False,
                                "properties": {
                                    "records": {"type": "array", "minItems": 1, "items": record(files=False)}
                                },
                            },
                        ]
                    }
                },
                "multipart/form-data": {"schema": record(files=True)},
            },
        },
        "responses": _responses("200", "400", "404", "408", "413", "415", "422", "429", "500", "503", "504", keys=keys),
    }
    infer_body = {
        "required": True,
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/InferenceRequest"}}},
    }
    infer = _responses("200", "400", "404", "408", "413", "415", "422", "429", "500", "503", "504", keys=keys)
    told = _responses("200", "404", keys=keys)

    def get(summary: str, responses: dict[str, Any], *parameters: dict[str, Any]) -> dict[str, Any]:
        return {"get": {"summary": summary, "parameters": list(parameters), "responses": responses}}

    def inference(*parameters: dict[str, Any]) -> dict[str, Any]:
        return {
            "post": {
                "summary": "Answer tensors of records.",
                "parameters": list(parameters),
                "requestBody": infer_body,
                "responses": infer,
            }
        }

    ready = _responses("200", "400", "503", keys=False)
    paths: dict[str, Any] = {
        "/v1/predict": {"post": predict},
        "/v1/draw": {
            "post": {
                "summary": "Draw what a text says; of a model that draws.",
                "parameters": query[:2],
                "requestBody": {"required": True, "content": {"application/json": {"schema": _DRAWN}}},
                "responses": {
                    **infer,
                    "200": {"description": "A picture.", "content": {"image/png": {}}},
                },
            }
        },
        "/v1/models": get("Models, versions, traffic.", _responses("200", keys=keys)),
        "/v2": get("The server.", _responses("200", keys=keys)),
        "/v2/health/live": get("Whether the process answers.", ready),
        "/v2/health/ready": get("Whether every model can be asked.", ready),
        "/v2/models/{name}": get("A model's tensors.", told, of_model),
        "/v2/models/{name}/ready": get(
            "Whether it can be asked.", _responses("200", "404", "503", keys=keys), of_model
        ),
        "/v2/models/{name}/versions/{version}": get("A version's tensors.", told, of_model, of_version),
        "/v2/models/{name}/infer": inference(of_model),
        "/v2/models/{name}/versions/{version}/infer": inference(of_model, of_version),
        "/metrics": {
            "get": {
                "summary": "For Prometheus.",
                "responses": {"200": {"description": "Text.", "content": {"text/plain": {}}}, **_unauthorized(keys)},
            }
        },
    }
    document: dict[str, Any] = {
        "openapi": "3.1.0",
        "info": {"title": "Dougong", "version": VERSION},
        "paths": paths,
        "components": {"schemas": {"InferenceRequest": _inference_schema()}},
    }
    if keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        document["security"] = [{"key": []}]
    return document


def _unauthorized(keys: bool) -> dict[str, Any]:
    return {"401": _ERROR} if keys else {}


def _responses(*statuses: str, keys: bool) -> dict[str, Any]:
    return {**{status: _JSON if status == "200" else _ERROR for status in statuses}, **_unauthorized(keys)}


def _record(models: Models) -> Any:
    columns: dict[str, Column] = {}
    for each in models.all:
        columns.update(each.columns.by_name)

    def schema(*, files: bool) -> dict[str, Any]:
        properties = {name: _value(column, files=files) for name, column in columns.items()}
        return {"type": "object", "additionalProperties": False, "properties": properties}

    return schema


def _value(column: Column, *, files: bool) -> dict[str, Any]:
    if column.kind in MEDIA and files:
        return {"type": "string", "format": "binary", "description": f"A file: {column.kind}."}
    if column.kind in MEDIA:
        return {"type": ["string", "null"], "contentEncoding": "base64", "description": f"A file: {column.kind}."}
    if column.kind == "number":
        return {"type": "number"} if files else {"type": ["number", "null"]}
    return {"type": "string"} if files else {"type": ["string", "null"]}


def _inference_schema() -> dict[str, Any]:
    tensor = {
        "type": "object",
        "required": ["name", "datatype", "shape", "data"],
        "properties": {
            "name": {"type": "string"},
            "datatype": {"type": "string"},
            "shape": {"type": "array", "items": {"type": "integer"}},
            "data": {"type": "array"},
            "parameters": {"type": "object"},
        },
    }
    return {
        "type": "object",
        "required": ["inputs"],
        "properties": {
            "id": {"type": "string"},
            "inputs": {"type": "array", "items": tensor},
            "outputs": {
                "type": "array",
                "items": {"type": "object", "required": ["name"], "properties": {"name": {"type": "string"}}},
            },
            "parameters": {"type": "object"},
        },
    }
