"""Reference page /docs: the OpenAPI document as plain HTML. FastAPI's own page loads its scripts from the internet."""

import html
from typing import Any

from fastapi import FastAPI

Record = dict[str, Any]

_HEAD = (
    '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>gpt2onnx API</title>'
    '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="stylesheet" href="style.css"></head>'
    '<body><header><h1>gpt2onnx API</h1></header><main><p>For programs: <a href="openapi.json">openapi.json</a>.</p>'
)


def document(app: FastAPI, vocabulary: int, key_needed: tuple[str, ...]) -> Record:
    """The OpenAPI document of an application.

    Args:
        vocabulary: number of tokens of the models.
        key_needed: beginnings of the paths that need an API key.
    """
    if app.openapi_schema is None:
        found = app.openapi_schema = FastAPI.openapi(app)
        if key_needed:
            found["components"]["securitySchemes"] = {"HTTPBearer": {"type": "http", "scheme": "bearer"}}
        for path, methods in found["paths"].items():
            for operation in methods.values():
                # FastAPI's own answer to a body that is wrong; this server's is 400.
                operation["responses"].pop("422", None)
                if path.startswith(key_needed):
                    operation["security"] = [{"HTTPBearer": []}]
        for name in ("HTTPValidationError", "ValidationError"):
            found["components"]["schemas"].pop(name, None)
        _limit_tokens(found, vocabulary)
    return app.openapi_schema


def _limit_tokens(part: Any, vocabulary: int) -> None:
    if isinstance(part, dict):
        if part.get("format") == "token-id":
            del part["exclusiveMaximum"]
            part["maximum"] = vocabulary - 1
        part = list(part.values())
    if isinstance(part, list):
        for each in part:
            _limit_tokens(each, vocabulary)


def page(document: Record) -> str:
    """The page of an OpenAPI document."""
    parts = [_HEAD]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2>{method.upper()} {html.escape(path)}</h2><p>{html.escape(operation['summary'])}</p>")
            if body := operation.get("requestBody"):
                fields = _resolved(document, body["content"]["application/json"]["schema"])["properties"]
                rows = [(name, _type(document, field), field["description"]) for name, field in fields.items()]
                parts.append(_table("Field", "Type", "Meaning", rows))
            answers = operation["responses"].items()
            rows = [(status, ", ".join(answer.get("content", {})), answer["description"]) for status, answer in answers]
            parts.append(_table("Status", "Content", "Meaning", rows))
    return "".join([*parts, "</main></body></html>"])


def _table(first: str, second: str, third: str, rows: list[tuple[str, str, str]]) -> str:
    head = "".join(f'<th scope="col">{name}</th>' for name in (first, second, third))
    body = "".join("<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def _resolved(document: Record, schema: Record) -> Record:
    name = schema.get("$ref", "").rpartition("/")[2]
    return document["components"]["schemas"][name] if name else schema


def _type(document: Record, schema: Record) -> str:
    """A JSON schema's type in words, with its range."""
    schema = _resolved(document, schema)
    if "anyOf" in schema:
        return " or ".join(_type(document, part) for part in schema["anyOf"] if part.get("type") != "null")
    if parts := schema.get("prefixItems") or ([schema["items"]] if "items" in schema else None):
        return f"[{', '.join(_type(document, part) for part in parts)}]"
    name = str(schema.get("const", schema.get("type", "any")))
    low, high = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    return name + _limit("from", low) + _limit("to", high)


def _limit(word: str, value: float | None) -> str:
    """One end of a range; those of 64-bit numbers and beyond limit nobody."""
    return "" if value is None or abs(value) >= 2**53 else f" {word} {value:g}"
