"""Calls on a store that may never return."""

from __future__ import annotations

import subprocess
import sys

_GIVE_UP = """
import time
from weightferry.cluster.store import call_abandonable

def work():
    time.sleep(1.5)
    print("the thread came back", flush=True)

def check():
    raise SystemExit("given up")

call_abandonable(work, check)
"""


def test_the_end_of_the_process_waits_for_a_thread_that_was_left_behind() -> None:
    """Otherwise torch aborts the process: the thread comes back from C++ to an interpreter that has ended."""
    done = subprocess.run([sys.executable, "-c", _GIVE_UP], capture_output=True, text=True, check=False, timeout=60)
    assert (done.returncode, done.stderr) == (1, "given up\n")
    assert done.stdout == "the thread came back\n"
