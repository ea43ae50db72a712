"""A hundred malformed files: each raises a typed error, runs no code, takes no memory and changes no parameter."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.timeout(180)
def test_over_a_hundred_malformed_files(tmp_path: Path) -> None:
    """Run in a separate process, since the test measures peak memory."""
    command = [sys.executable, "-m", "tests.unit.loading.malformed", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=Path(__file__).parents[3])
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["wrong"] == {}
    assert report["tried"] > 100
    assert report["grew"] < 100e6
