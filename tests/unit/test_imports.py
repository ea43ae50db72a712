"""What an import costs: users pay it on every rank."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "submitit", "huggingface_hub", "fsspec", "numpy", "safetensors", "transformers")
HTTP_LIBRARIES = ("urllib3", "requests", "httpx", "httpx2")


def imported(*arguments: str) -> tuple[set[str], str]:
    environ = {name: value for name, value in os.environ.items() if not name.startswith(("COV", "PYTHON"))}
    ran = subprocess.run(
        [sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True, check=True, env=environ
    )
    lines = [line.rpartition("|")[2].strip() for line in ran.stderr.splitlines() if line.startswith("import time:")]
    return {name.partition(".")[0] for name in lines} | set(lines), ran.stdout


def test_importing_the_package_costs_nothing() -> None:
    modules, _ = imported("-c", "import weightferry")
    assert "weightferry._version" in modules
    assert modules.isdisjoint((*HEAVY, *HTTP_LIBRARIES))


@pytest.mark.parametrize("arguments", [("--help",), ("stage", "--help"), ("--version",)])
def test_help_needs_nothing_heavy(arguments: tuple[str, ...]) -> None:
    command = Path(sys.executable).with_name("weightferry")
    modules, said = imported(str(command), *arguments)
    assert "weightferry.cli" in modules
    assert modules.isdisjoint((*HEAVY, *HTTP_LIBRARIES))
    assert "weightferry" in said


def test_errors_and_sources_need_nothing_heavy() -> None:
    modules, _ = imported("-c", "from weightferry import CollectError, FetchSource, Settings")
    assert modules.isdisjoint((*HEAVY, *HTTP_LIBRARIES))
