"""The description of the server as a page to read."""

from __future__ import annotations

import html
import json
from typing import Any

_STYLE = """
:root { color-scheme: light dark; --line: #8885; --soft: #888; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1.25rem; }
h2 { margin-top: 2.5rem; } article { border: 1px solid var(--line); border-radius: .6rem; margin: .8rem 0; }
summary { padding: .6rem 1rem; cursor: pointer; } code, pre { font-family: ui-monospace, monospace; font-size: .9em; }
.method { display: inline-block; min-width: 3.5em; font-weight: 700; } .inside { padding: 0 1rem 1rem; }
table { border-collapse: collapse; width: 100%; } td, th { text-align: left; padding: .25rem .6rem .25rem 0;
vertical-align: top; border-top: 1px solid var(--line); } pre { overflow-x: auto; padding: .8rem; border: 1px solid
var(--line); border-radius: .4rem; }
"""


def to_html(document: dict[str, Any]) -> bytes:
    """The document as a page without scripts and without anything from elsewhere."""
    sections: dict[str, list[str]] = {}
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            sections.setdefault(operation["tags"][0], []).append(_article(method, path, operation))
    titles = {"recognition": "Recognition", "v2": "Open Inference Protocol v2", "operations": "Operations"}
    body = "".join(f"<h2>{titles[tag]}</h2>{''.join(articles)}" for tag, articles in sections.items())
    schemas = "".join(
        f"<details id='{name}'><summary><code>{name}</code></summary><pre>"
        f"{html.escape(json.dumps(schema, indent=2))}</pre></details>"
        for name, schema in document["components"]["schemas"].items()
    )
    info = document["info"]
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><title>Manyeyes: HTTP</title>"
        "<meta name='viewport' content='width=device-width, initial-scale=1'>"
        f"<style>{_STYLE}</style></head><body><main>"
        f"<h1>{html.escape(info['title'])} {html.escape(info['version'])}</h1>"
        f"<p>{html.escape(info['description'])} "
        "As a document for programs: <a href='openapi.json'>openapi.json</a>.</p>"
        f"<pre>curl --data-binary @photo.jpg 'http://HOST:PORT/v1/recognize?top_k=3'</pre>"
        f"{body}<h2>Schemas</h2>{schemas}</main></body></html>"
    ).encode()


def _article(method: str, path: str, operation: dict[str, Any]) -> str:
    parameters = "".join(
        f"<tr><td><code>{html.escape(each['name'])}</code></td><td>{each['in']}</td>"
        f"<td>{html.escape(each.get('description', ''))}</td></tr>"
        for each in operation.get("parameters", [])
    )
    bodies = ", ".join(
        f"<code>{html.escape(name)}</code>" for name in operation.get("requestBody", {}).get("content", {})
    )
    responses = "".join(
        f"<tr><td>{status}</td><td>{html.escape(response['description'])}</td><td>"
        + ", ".join(
            f"{html.escape(media_type)} {_schema_link(content['schema'])}"
            for media_type, content in response["content"].items()
        )
        + "</td></tr>"
        for status, response in operation["responses"].items()
    )
    return (
        f"<article><details><summary><span class='method'>{method.upper()}</span> <code>{html.escape(path)}</code> "
        f"&nbsp; {html.escape(operation['summary'])}</summary><div class='inside'>"
        + (f"<p>Body: {bodies}</p>" if bodies else "")
        + (f"<table>{parameters}</table>" if parameters else "")
        + f"<table>{responses}</table></div></details></article>"
    )


def _schema_link(schema: dict[str, Any]) -> str:
    name = schema.get("$ref", "").rpartition("/")[2]
    return f"<a href='#{name}'>{name}</a>" if name else ""
