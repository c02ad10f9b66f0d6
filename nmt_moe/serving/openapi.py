"""Describe request bodies in the OpenAPI document, and render that document as a page."""

from __future__ import annotations

import json
from html import escape
from typing import Any

from pydantic import BaseModel


def describe_body(model: type[BaseModel]) -> dict[str, Any]:
    """Return a route's `openapi_extra` for a JSON or form body."""
    schema = model.model_json_schema()
    kinds = ("application/json", "application/x-www-form-urlencoded", "multipart/form-data")
    return {"requestBody": {"required": True, "content": {k: {"schema": schema} for k in kinds}}}


PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>API of this server</title>
<style>
:root { color-scheme: light dark; }
body { font: 1rem/1.5 system-ui, sans-serif; max-width: 50rem; margin: 2rem auto; padding: 0 1rem; }
h2 { margin: 2.5rem 0 0; font-size: 1.1rem; font-family: ui-monospace, monospace; }
pre { white-space: pre-wrap; padding: .75rem; border: 1px solid #8886; border-radius: .5rem; }
td, th { text-align: left; padding: .2rem 1rem .2rem 0; vertical-align: top; }
</style></head><body>
<h1>API of this server</h1>
<p>Programs can read <a href="openapi.json">openapi.json</a>; people can use
<a href="./">the web page</a>. Errors have the form <code>{"error": "what is wrong"}</code>.</p>
BODY
</body></html>
"""


def render_page(document: dict[str, Any]) -> str:
    """Return an OpenAPI document as a self-contained page."""
    parts = []
    for path, methods in document["paths"].items():
        for method, route in methods.items():
            parts.append(f"<h2>{method.upper()} {escape(path)}</h2>")
            parts.append(f"<p>{escape(route.get('description', route.get('summary', '')))}</p>")
            body = route.get("requestBody")
            if body is not None:
                schema = body["content"]["application/json"]["schema"]
                parts.append(_fields(schema))
                parts.append(_example(path, schema))
    return PAGE.replace("BODY", "\n".join(parts))


def _fields(schema: dict[str, Any]) -> str:
    needed = schema.get("required", [])
    rows = [
        f"<tr><td><code>{escape(name)}</code></td><td>{escape(field.get('description', ''))}</td>"
        f"<td>{'required' if name in needed else ''}</td></tr>"
        for name, field in schema["properties"].items()
    ]
    return f"<table>{''.join(rows)}</table>"


def _example(path: str, schema: dict[str, Any]) -> str:
    values = {
        name: field["examples"][0]
        for name, field in schema["properties"].items()
        if "examples" in field
    }
    content = json.dumps(values, ensure_ascii=False)
    line = f"curl http://127.0.0.1:5000{path} -H 'Content-Type: application/json' -d '{content}'"
    return f"<pre>{escape(line)}</pre>"
