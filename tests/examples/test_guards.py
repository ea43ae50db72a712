"""A call that waits inside a guard of accelerate, transformers or Lightning says so, with the real packages."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.examples.processes import run_to_end
from weightferry.testing.hub import HubServer

SCRIPT = Path(__file__).with_name("guards.py")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LIMIT = 300.0  # seconds; two processes import large packages on a busy machine
AGREE = 4  # seconds
# By guard, how the warning names it.
GUARDS = {
    "main_process_first": "main_process_first",
    "local_main_process_first": "local_main_process_first",
    "TrainingArguments": "main_process_first",
    "prepare_data": "Lightning's prepare_data",
    "rank_zero_only": "Lightning's rank_zero_only",
    "on_main_process": "accelerate's on_main_process or a decorator like it",
    "if rank == 0": "`if dist.get_rank() == 0:`",
}


@pytest.fixture(scope="module")
def calls(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By guard, what happened in the call of rank 0; all guards in one job."""
    folder = tmp_path_factory.mktemp("guards")
    with HubServer() as hub:
        hub.add_repo("org/model", {"config.json": b"{}"})
        command = [*TORCHRUN, str(SCRIPT), "org/model", str(folder)]
        run_to_end(command, hub, folder, LIMIT, {"WEIGHTFERRY_AGREE_TIMEOUT": str(AGREE)})
        assert hub.requests == []
    return {call["guard"]: call for call in json.loads((folder / "rank0.json").read_text())}


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize("guard", GUARDS)
def test_a_call_inside_a_guard(calls: dict[str, dict[str, Any]], guard: str) -> None:
    call = calls[guard]
    ((seconds, warning),) = call["warnings"]
    # A call without a guard is reported after half of `agree_timeout`, or 8 s; this one with the first heartbeat.
    assert seconds < 10
    said = (
        f"rank 0 calls stage() at guards.py:{line_of_call()} in stage inside {GUARDS[guard]}; rank 1 did not call yet"
    )
    advice = "call it on every rank, without the guard, or pass coordinate=False for this process alone."
    for text in (warning, call["error"]):
        assert said in text
        assert advice in text
    assert call["error"].startswith("LeaderLost: ")


def line_of_call() -> int:
    """The number of the line in the script where it stages."""
    lines = SCRIPT.read_text().splitlines()
    return next(number for number, line in enumerate(lines, 1) if "weightferry.stage(" in line)
