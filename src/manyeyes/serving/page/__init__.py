"""The page to try the server: written as several files, sent as one that needs nothing from outside."""

from __future__ import annotations

import importlib.resources
import re


def read_page() -> bytes:
    """index.html with its styles and scripts within."""
    folder = importlib.resources.files(__name__)

    def inline(reference: re.Match[str]) -> str:
        tag = "style" if reference["style"] else "script"
        content = folder.joinpath(reference["style"] or reference["script"]).read_text(encoding="utf-8")
        return f"<{tag}>\n{content}</{tag}>"

    page = folder.joinpath("index.html").read_text(encoding="utf-8")
    references = r'<link rel="stylesheet" href="(?P<style>\w+\.css)">|<script src="(?P<script>\w+\.js)"></script>'
    return re.sub(references, inline, page).encode()
