"""What the tests of one process share."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.doubles import FakeMonitor
from weightferry.cache.layout import CacheLayout
from weightferry.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Limits that no test has to wait for."""
    return Settings(cache_dir=tmp_path / "cache", retry_wait=0.001, retries=3, lock_timeout=0.2)


@pytest.fixture
def layout(settings: Settings) -> CacheLayout:
    return CacheLayout(settings.cache_dir)


@pytest.fixture
def monitor() -> FakeMonitor:
    return FakeMonitor()
