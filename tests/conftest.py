"""What tests of every kind share. Fixtures that start or load a ComfyUI are in tests/nodes/conftest.py."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tools import testbed


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A complete Instruct checkpoint folder in the official layout: seeded random weights, small enough for a CPU."""
    folder = tmp_path_factory.mktemp("checkpoints") / "tiny-instruct"
    return testbed.make_tiny_checkpoint(Path(sys.executable), folder, "instruct")
