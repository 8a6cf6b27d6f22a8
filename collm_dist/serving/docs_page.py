"""HTML page of the service's OpenAPI document: endpoints, fields, example requests. Loads nothing from other hosts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = """
body { font: 16px/1.5 sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
table { border-collapse: collapse } td, th { text-align: left; vertical-align: top; padding: .2rem 1rem .2rem 0 }
code, pre, textarea { font: 14px/1.4 monospace } pre { background: #f4f4f4; padding: .6rem; white-space: pre-wrap }
textarea { width: 100%; box-sizing: border-box }
"""
# Sends the request of the form that holds the button, and shows the answer below it.
_SCRIPT = """
async function send(form, method, path) {
  const body = form.elements.body, shown = form.querySelector('output');
  const options = body ? {method, headers: {'Content-Type': 'application/json'}, body: body.value} : {method};
  const answer = await fetch(path, options);
  const text = await answer.text();
  let pretty = text;
  try { pretty = JSON.stringify(JSON.parse(text), null, 2); } catch (error) {}
  const block = document.createElement('pre');
  block.textContent = `${answer.status} ${answer.statusText}\\n${pretty}`;
  shown.replaceChildren(block);
}
"""


def render_docs_page(document: Mapping[str, Any]) -> str:
    """Return the page of an OpenAPI document whose bodies are JSON objects."""
    title, about = escape(document["info"]["title"]), escape(document["info"].get("description", ""))
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style>',
        f"<script>{_SCRIPT}</script></head><body><h1>{title}</h1><p>{about} The schema: "
        '<a href="openapi.json">openapi.json</a>.</p>',
    ]
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            parts += _render_operation(document, path, method.upper(), operation)
    return "\n".join([*parts, "</body></html>", ""])


def _render_operation(
    document: Mapping[str, Any], path: str, method: str, operation: Mapping[str, Any]
) -> Iterator[str]:
    yield f"<h2><code>{method} {escape(path)}</code></h2>"
    yield "".join(f"<p>{escape(text)}</p>" for text in operation.get("description", "").split("\n\n"))
    body = operation.get("requestBody")
    examples: list[Any] = [None]
    if body is not None:
        schema = _resolve(document, body["content"]["application/json"]["schema"])
        examples = schema.get("examples", [{}])
        yield from _render_table("field", {name: _describe(field) for name, field in schema["properties"].items()})
    if parameters := operation.get("parameters"):
        described = {field["name"]: _describe({**field["schema"], **field}) for field in parameters}
        yield from _render_table("parameter", described)
    for example in examples:
        yield _render_example(path, method, example)
    yield from _render_table(
        "status", {status: escape(answer["description"]) for status, answer in operation["responses"].items()}
    )


def _render_example(path: str, method: str, example: Any) -> str:
    """Return a command and a form that sends the same request."""
    area, data = "", ""
    if example is not None:
        body = json.dumps(example, ensure_ascii=False)
        area = f'<textarea name="body" rows="3" aria-label="body">{escape(body)}</textarea>'
        quoted = body.replace("'", "'\\''")
        data = f" -H 'Content-Type: application/json' -d '{quoted}'"
    call = escape(f"send(this.form, '{method}', '{path.lstrip('/')}')")
    return (
        f"<pre>curl{escape(data)} http://HOST:PORT{escape(path)}</pre>"
        f'<form>{area}<button type="button" onclick="{call}">Send</button><output></output></form>'
    )


def _render_table(name: str, rows: Mapping[str, str]) -> Iterator[str]:
    yield f"<table><tr><th>{name}</th><th>meaning</th></tr>"
    yield from (f"<tr><td><code>{escape(key)}</code></td><td>{text}</td></tr>" for key, text in rows.items())
    yield "</table>"


def _describe(field: Mapping[str, Any]) -> str:
    limits = [kind for kind in (field, *field.get("anyOf", ())) if kind.keys() & _LIMITS.keys()]
    shown = [f"{text} {kind[name]}" for kind in limits for name, text in _LIMITS.items() if name in kind]
    if field.get("default") is not None:
        shown.append(f"default {field['default']}")
    return escape(" ".join([field.get("description", ""), f"({', '.join(shown)})" if shown else ""]).strip())


_LIMITS = {"minItems": "at least", "maxItems": "at most", "minimum": "at least", "maximum": "at most"}


def _resolve(document: Mapping[str, Any], schema: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the schema that a reference names."""
    while "$ref" in schema:
        found: Any = document
        for part in schema["$ref"].removeprefix("#/").split("/"):
            found = found[part]
        schema = found
    return schema
