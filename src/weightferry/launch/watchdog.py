"""End a rank that waits inside a collective for a rank that has failed."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import submitit
from submitit.core.utils import cloudpickle_dump, temporary_save_path

from weightferry.cluster.coordinator import Aborted, Coordinator

_CHECK_INTERVAL = 1.0  # seconds
# Seconds for a rank to fail on its own before the watchdog ends it: gloo raises at once when a peer is gone.
_GRACE_PERIOD = 10.0


@contextlib.contextmanager
def watchdog(coordinator: Coordinator) -> Iterator[None]:
    """Within this context, end the process if the operation failed on another rank and this rank does not end.

    The watchdog writes the known failure as the result of the task, so that submitit shows it to the user.
    """
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(coordinator, done), name="weightferry-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(coordinator: Coordinator, done: threading.Event) -> None:
    while not done.wait(_CHECK_INTERVAL):
        try:
            coordinator.check()
        except Aborted as aborted:
            if done.wait(_GRACE_PERIOD):
                return
            coordinator.wait_until_all_informed(0)
            with contextlib.suppress(Exception):
                path = submitit.JobEnvironment().paths.result_pickle
                text = f"{aborted}\nThis rank was inside a call that did not return; the watchdog ended it."
                with temporary_save_path(path) as part:
                    cloudpickle_dump(("error", text), part)
            os._exit(1)
