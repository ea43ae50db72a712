"""A hundred malformed files: a typed error each, no code run, no memory taken, no parameter touched."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(180)
def test_over_a_hundred_malformed_files(tmp_path: Path) -> None:
    """In a process of its own, since memory is measured at its peak."""
    command = [sys.executable, "-m", "tests.unit.loading.malformed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["wrong"] == {}
    assert told["tried"] > 100
    assert told["grew"] < 100e6
