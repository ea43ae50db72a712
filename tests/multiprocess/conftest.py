"""Fixtures for tests with real ranks."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.multiprocess.nodes import Nodes
from weightferry.testing.hub import HubServer


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with HubServer() as hub:
        yield Nodes(hub, tmp_path)
