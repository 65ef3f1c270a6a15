"""The page of a report: one file that asks for nothing, whose scripts draw what stands in it as JSON."""

from __future__ import annotations

import base64
import hashlib
import html
import importlib.resources
import json
import re
from typing import Any, Literal

_SHARED_SCRIPTS = ("common.js", "table.js", "charts.js")
_SCRIPTS = {
    "report": ("matrix.js", "classes.js", "calibration.js", "examples.js", "data.js", "report.js"),
    "compare": ("compare.js",),
}


def render(kind: Literal["report", "compare"], title: str, content: dict[str, Any]) -> bytes:
    """The page as UTF-8.

    Names of classes, paths and messages of others are in `content` and `title`: these become JSON, of which scripts
    make text, never markup. Should one of them become markup all the same, the page's policy runs only the scripts and
    takes only the style of this package, and lets nothing be fetched.

    Args:
        content: plain JSON values without NaN.
    """
    style = "".join(
        importlib.resources.files(package).joinpath(name).read_text(encoding="utf-8")
        for package, name in (("manyeyes.serving.page", "base.css"), (__name__, "report.css"))
    )
    folder = importlib.resources.files(__name__)
    scripts = [folder.joinpath(name).read_text(encoding="utf-8") for name in (*_SHARED_SCRIPTS, *_SCRIPTS[kind])]
    script = "".join(scripts)
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash_of(style)}; script-src {_hash_of(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    data = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    # So that nothing within ends the element.
    data = data.replace("<", "\\u003c")
    page = folder.joinpath("index.html").read_text(encoding="utf-8")
    values = {"POLICY": policy, "TITLE": html.escape(title), "STYLE": style, "SCRIPT": script, "DATA": data}
    # In one pass, so that nothing within a value is taken for a place.
    page = re.sub(r"\{\{([A-Z]+)\}\}", lambda place: values[place[1]], page)
    # File names that are not UTF-8 have surrogates, which no page can hold.
    return page.encode("utf-8", "replace")


def _hash_of(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"
