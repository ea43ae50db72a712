"""The error of the testbed."""

from __future__ import annotations


class TestbedError(RuntimeError):
    """A testbed operation failed; the text says why and, if possible, what to do."""

    __test__ = False  # pytest collects classes by this prefix
