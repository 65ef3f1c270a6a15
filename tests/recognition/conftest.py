from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from manyeyes.recognition.bundle import GOLDEN_NAME, MODEL_NAME, Bundle, write_bundle


@pytest.fixture
def bundle_copy(small_bundle: str, tmp_path: Path) -> Path:
    """A bundle that the test may damage."""
    return Path(shutil.copytree(small_bundle, tmp_path / "bundle"))


@pytest.fixture
def forged(small_bundle: str, tmp_path: Path) -> Callable[..., str]:
    """Make a bundle with other content, but with checksums and fingerprints that agree."""

    def forge(files: dict[str, bytes] | None = None, **changes: Any) -> str:
        bundle = Bundle.load(small_bundle)
        kept = {name: bundle.read_file(name) for name in (MODEL_NAME, GOLDEN_NAME)}
        uri = str(tmp_path / "forged")
        write_bundle(uri, dataclasses.replace(bundle.info, **changes), {**kept, **(files or {})})
        return uri

    return forge
