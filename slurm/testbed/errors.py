"""The one error of the testbed."""

from __future__ import annotations


class TestbedError(RuntimeError):
    """The testbed could not do what was asked; the text says why and, where there is one, the way out."""

    __test__ = False  # pytest collects classes by this prefix
