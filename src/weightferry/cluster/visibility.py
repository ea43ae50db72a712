"""Wait for a file that another machine made: network file systems show it late."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

_POLL = (0.02, 0.5)  # seconds between two looks: the first, the longest


def wait_until_visible(look: Callable[[], T], path: Path, timeout: float, check: Callable[[], None]) -> T:
    """Call `look` until it finds a file that must exist, and return its value.

    Clients of network file systems cache what they know of a folder, so they miss new files, and they may lose the
    handle of a file (ESTALE).

    Parameters
    ----------
    path
        Of the file. Its folder is listed before each further look: that makes clients ask their server again.
    timeout
        Seconds.
    check
        Called between two looks; an error that it raises ends the wait.

    Raises
    ------
    OSError
        The error of the last look.
    """
    until, (pause, longest) = time.monotonic() + timeout, _POLL
    while True:
        try:
            return look()
        except OSError as error:
            transient = isinstance(error, FileNotFoundError) or error.errno == errno.ESTALE
            if not transient or time.monotonic() > until:
                raise
        check()
        time.sleep(pause)
        pause = min(2 * pause, longest)
        with contextlib.suppress(OSError):
            list(path.parent.iterdir())
