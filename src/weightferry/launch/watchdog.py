"""Ends a rank that cannot end itself: another one has failed, and this one waits for it inside a collective."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterator

import submitit
from submitit.core.utils import cloudpickle_dump, temporary_save_path

from weightferry.cluster.coordinator import Aborted, Coordinator

_LOOK_EVERY = 1.0  # seconds
# Seconds for a rank to notice by itself (a gloo peer that is gone raises at once) before it is ended.
_PATIENCE = 10.0


@contextlib.contextmanager
def watchdog(coordinator: Coordinator) -> Iterator[None]:
    """While in this context, end the process some seconds after the operation has failed elsewhere.

    What is known of the failure is left as the task's result, so that the job's owner reads it there.
    """
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(coordinator, over), name="weightferry-watchdog", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


def _watch(coordinator: Coordinator, over: threading.Event) -> None:
    while not over.wait(_LOOK_EVERY):
        try:
            coordinator.check()
        except Aborted as aborted:
            if over.wait(_PATIENCE):
                return
            coordinator.all_told(0)
            with contextlib.suppress(Exception):
                path = submitit.JobEnvironment().paths.result_pickle
                with temporary_save_path(path) as part:
                    cloudpickle_dump(("error", f"{aborted}\nThis rank was inside a call that did not return."), part)
            os._exit(1)
