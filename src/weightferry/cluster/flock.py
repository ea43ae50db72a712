"""flock(2), on file systems that support it."""

from __future__ import annotations

import errno
import fcntl

# Some file systems return EACCES in place of EWOULDBLOCK.
_HELD = (errno.EAGAIN, errno.EACCES)


def try_flock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file without waiting; return whether that succeeded.

    Raises
    ------
    OSError
        The file system has no such lock (ENOSYS, ENOLCK, EOPNOTSUPP), or not for a file opened in this mode (EBADF).
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True
