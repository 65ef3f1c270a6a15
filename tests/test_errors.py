"""Errors survive the way from a worker to the driver, and the tree in the docstring is the tree in the code."""

from __future__ import annotations

import pickle
import re

import pytest

from manyeyes import errors
from manyeyes.errors import ImageError, ManyeyesError, MissingExtraError, Reason, TaskError


def all_error_classes(root: type[ManyeyesError] = ManyeyesError) -> list[type[ManyeyesError]]:
    return [root, *(found for child in root.__subclasses__() for found in all_error_classes(child))]


def example_of(error_class: type[ManyeyesError]) -> ManyeyesError:
    if error_class is ImageError:
        return ImageError(Reason.TRUNCATED, "the end is missing")
    if error_class is MissingExtraError:
        return MissingExtraError("training", "train")
    if error_class is TaskError:
        return TaskError("Task 3 failed", "Traceback …")
    return error_class("what happened")


@pytest.mark.parametrize("error_class", all_error_classes(), ids=lambda error_class: error_class.__name__)
def test_every_error_travels_between_processes_unchanged(error_class):
    error = example_of(error_class)
    copy = pickle.loads(pickle.dumps(error))
    assert type(copy) is error_class
    assert str(copy) == str(error)
    assert vars(copy) == vars(error)


def test_the_tree_in_the_docstring_is_the_tree_in_the_code():
    drawn = dict(re.findall(r"(\w+Error) +(\d)", errors.__doc__))
    assert drawn == {found.__name__: str(found.exit_code) for found in all_error_classes()}


def test_a_missing_extra_says_what_to_install():
    message = str(MissingExtraError("training", "train"))
    assert message.startswith("training needs an optional part")
    assert "pip install 'manyeyes[train]'" in message
