"""The interface's description as a page: plain HTML from the OpenAPI document, without scripts or anything from elsewhere."""

import base64
import hashlib
import html
from collections.abc import Iterator
from typing import Any

_STYLE = (
    "body{font:16px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color-scheme:light dark}"
    "table{border-collapse:collapse;width:100%}td,th{border-bottom:1px solid #8886;padding:.3rem .6rem .3rem 0;"
    "text-align:left;vertical-align:top}code{font-size:.9em;overflow-wrap:anywhere}h2{margin-top:2.5rem}"
)
_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_HASH}'; base-uri 'none'; form-action 'none';"
    " frame-ancestors 'none'"
}


def page(document: dict[str, Any]) -> str:
    """An OpenAPI document in HTML.

    Args:
        document: as FastAPI makes it.
    """
    info = document["info"]
    title = html.escape(f"{info['title']} {info['version']}")
    parts = [
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<style>{_STYLE}</style></head><body><main><h1>{title}</h1>",
        f"<p>{html.escape(info.get('summary', ''))} For programs: <a href='openapi.json'>openapi.json</a>.</p>",
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts.append(f"<h2><code>{method.upper()} {html.escape(path)}</code></h2>")
            parts.append(f"<p>{html.escape(operation['summary'])}</p>")
            body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("schema")
            if body:
                parts += _table(("Field", "Type", "Meaning"), _fields(document, body))
            parts += _table(("Status", "", "Meaning"), _answers(operation))
    return "".join([*parts, "</main></body></html>"])


def _table(head: tuple[str, str, str], rows: Iterator[tuple[str, str, str]]) -> Iterator[str]:
    yield "<table><thead><tr>" + "".join(f"<th scope='col'>{name}</th>" for name in head) + "</tr></thead><tbody>"
    for name, kind, meaning in rows:
        yield f"<tr><td><code>{html.escape(name)}</code></td><td>{html.escape(kind)}</td><td>{html.escape(meaning)}</td></tr>"
    yield "</tbody></table>"


def _answers(operation: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for status, answer in operation["responses"].items():
        yield status, ", ".join(answer.get("content", {})), answer["description"]


def _fields(document: dict[str, Any], schema: dict[str, Any]) -> Iterator[tuple[str, str, str]]:
    for name, field in _resolved(document, schema)["properties"].items():
        yield name, _kind(document, field), field.get("description", "")


def _resolved(document: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = schema.get("$ref")
    if reference is None:
        return schema
    found: dict[str, Any] = document["components"]["schemas"][reference.rsplit("/", 1)[-1]]
    return found


def _kind(document: dict[str, Any], schema: dict[str, Any]) -> str:
    """A type in words, with its limits."""
    schema = _resolved(document, schema)
    if "anyOf" in schema:
        kinds = [_kind(document, part) for part in schema["anyOf"]]
        return " or ".join(kind for kind in kinds if kind != "null")
    if "const" in schema or "enum" in schema:
        return ", ".join(repr(value) for value in schema.get("enum", [schema.get("const")]))
    name = str(schema.get("type", "any"))
    if name == "array":
        parts = schema.get("prefixItems") or [schema.get("items", {})]
        name = f"[{', '.join(_kind(document, part) for part in parts)}]"
    least, most = schema.get("minimum", schema.get("exclusiveMinimum")), schema.get("maximum")
    if least is not None and most is not None:
        return f"{name} {least:g} to {most:g}"
    return name if least is None else f"{name} from {least:g}"
