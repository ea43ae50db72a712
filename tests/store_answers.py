"""Let the kernel answer system calls of this process as other file systems would (seccomp(2)).

Nothing of the code under test is replaced: Python, its libraries and the C library ask the kernel, and get that answer.
"""

from __future__ import annotations

import ctypes
import platform
import struct

# asm/unistd.h; the numbers of x86-64 and of AArch64
_NUMBERS = {
    "x86_64": {"flock": 73, "fallocate": 285},
    "aarch64": {"flock": 32, "fallocate": 47},
}
_PR_SET_NO_NEW_PRIVS, _PR_SET_SECCOMP, _MODE_FILTER = 38, 22, 2
# BPF: load the word at an offset; jump when equal; return.
_LOAD, _JUMP_EQUAL, _RETURN = 0x20, 0x15, 0x06
_ALLOW, _ERRNO = 0x7FFF0000, 0x00050000


def known() -> bool:
    """Whether the numbers of this machine's system calls are known here."""
    return platform.machine() in _NUMBERS


def answer(call: str, errno: int) -> None:
    """From now on, in this thread and those that it starts, `call` does nothing and gives `errno`; 0: it succeeds."""
    number = _NUMBERS[platform.machine()][call]
    program = b"".join(
        struct.pack("HBBI", *step)
        for step in (
            (_LOAD, 0, 0, 0),  # seccomp_data.nr
            (_JUMP_EQUAL, 0, 1, number),
            (_RETURN, 0, 0, _ERRNO | errno),
            (_RETURN, 0, 0, _ALLOW),
        )
    )
    steps = ctypes.create_string_buffer(program, len(program))
    filters = struct.pack("HP", len(program) // 8, ctypes.addressof(steps))
    libc = ctypes.CDLL(None, use_errno=True)
    for option, *values in (
        (_PR_SET_NO_NEW_PRIVS, 1, 0),
        (_PR_SET_SECCOMP, _MODE_FILTER, filters),
    ):
        if libc.prctl(option, *values, 0, 0):
            raise OSError(ctypes.get_errno(), "prctl")
