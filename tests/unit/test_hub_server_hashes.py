"""`HubServer` uses a given SHA-256 for a file that is too large to hash."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from pathlib import Path

import pytest

from tests.unit.test_hub_server_http import RESOLVE, request
from weightferry.testing.hub import HubOptions, HubServer

HUGE = 10_000_000_000
GIVEN = "ab" * 32


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "org/model").mkdir(parents=True)
    with (tmp_path / "org/model/huge.bin").open("wb") as file:
        file.truncate(HUGE)
    return tmp_path


def published_sha256(hub: HubServer) -> str:
    return request(f"{hub.url}{RESOLVE}huge.bin", "HEAD").headers["X-Linked-ETag"].strip('"')


def test_an_added_repository(root: Path) -> None:
    with HubServer() as hub:
        hub.add_repo("org/model", root / "org/model", sha256s={"huge.bin": GIVEN})
        assert published_sha256(hub) == GIVEN
        location = request(f"{hub.url}{RESOLVE}huge.bin").headers["Location"]
        assert request(location, Range=f"bytes={HUGE - 5}-").body == bytes(5)


def test_a_root(root: Path) -> None:
    with HubServer(root, options=HubOptions(sha256s={"org/model/huge.bin": GIVEN})) as hub:
        assert published_sha256(hub) == GIVEN


def test_a_changed_file_is_hashed(root: Path) -> None:
    with HubServer(root, options=HubOptions(sha256s={"org/model/huge.bin": GIVEN})) as hub:
        (root / "org/model/huge.bin").write_bytes(b"small")
        assert published_sha256(hub) == hashlib.sha256(b"small").hexdigest()


def test_the_command(root: Path) -> None:
    command = [sys.executable, "-m", "weightferry.testing.hub", str(root), "--sha256", f"org/model/huge.bin={GIVEN}"]
    with subprocess.Popen([*command, "--xet"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        url = process.stdout.readline().strip()
        headers = request(f"{url}{RESOLVE}huge.bin", "HEAD").headers
        assert headers["X-Linked-ETag"] == f'"{GIVEN}"'
        assert "X-Xet-Hash" in headers
        process.terminate()


def test_invalid_arguments(root: Path) -> None:
    with HubServer() as hub:
        with pytest.raises(ValueError, match="not a SHA-256"):
            hub.add_repo("org/model", root / "org/model", sha256s={"huge.bin": "AB"})
        with pytest.raises(ValueError, match="in memory"):
            hub.add_repo("org/model", {"x": b""}, sha256s={"x": GIVEN})
        with pytest.raises(FileNotFoundError):
            hub.add_repo("org/model", root / "org/model", sha256s={"gone.bin": GIVEN})
