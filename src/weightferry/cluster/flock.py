"""flock(2), as far as a file system has it."""

from __future__ import annotations

import errno
import fcntl

# Some file systems answer EACCES where the others say EWOULDBLOCK.
_HELD = (errno.EAGAIN, errno.EACCES)


def try_flock(descriptor: int, kind: int = fcntl.LOCK_EX) -> bool:
    """Lock an open file without waiting; whether that was possible.

    Raises
    ------
    OSError
        There is no such lock here (ENOSYS, ENOLCK, EOPNOTSUPP), or none of this kind on a file opened so (EBADF).
    """
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            return False
        raise
    return True
