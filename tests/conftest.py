"""What all tests share."""

from __future__ import annotations

import os

import pytest


def need(condition: object, reason: str) -> None:
    """Skip the test when what it needs is missing; with ``CI=true`` that is a failure.

    Parameters
    ----------
    condition
        Whether it is there.
    reason
        What is missing, and how to get it.
    """
    if condition:
        return
    if os.environ.get("CI", "").lower() == "true":
        pytest.fail(f"with CI=true nothing may be skipped, and this test could not run: {reason}", pytrace=False)
    pytest.skip(reason)
