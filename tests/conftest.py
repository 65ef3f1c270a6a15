"""Shared by all tests: quiet TensorFlow, and no silent skips in CI."""

from __future__ import annotations

import os
from collections.abc import Generator
from typing import Any

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("KERAS_BACKEND", "tensorflow")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Generator[None, Any, Any]:
    """With MANYEYES_REQUIRE_ALL=1 a test that skips for want of a component fails; only a GPU may be missing."""
    report = yield
    required = os.environ.get("MANYEYES_REQUIRE_ALL") == "1" and item.get_closest_marker("gpu") is None
    if required and report.skipped and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped ({reason}), but MANYEYES_REQUIRE_ALL=1 forbids it."
    return report
