"""What a newcomer reads first."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from manyeyes.cli.main import VERBS, app
from manyeyes.models.registry import MODEL_NAMES


def help_of(verb: str) -> str:
    done = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0
    return re.sub(r"\x1b\[[0-9;]*m", "", done.output)


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_by_an_example_and_names_its_arguments(verb):
    text = help_of(verb)
    assert re.search(rf"Example: +manyeyes {verb} \S", text)
    usage = next(line for line in text.splitlines() if "Usage:" in line)
    assert re.search(r"\[OPTIONS\]( \{?[A-Z]+\}?| \[[A-Z]+\](\.\.\.)?)+ *$", usage)


def test_the_help_of_train_names_every_model():
    text = help_of("train")
    assert [name for name in MODEL_NAMES if name not in text] == []
