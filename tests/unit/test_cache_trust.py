"""A cache folder that another user may have prepared is refused; one that root or a group of the user made is not."""

from __future__ import annotations

import os
import pwd
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.conftest import need
from weightferry.cache.evict import evict
from weightferry.cache.layout import CacheLayout
from weightferry.cache.lock_support import LockSupport
from weightferry.cache.partial import PartialFile
from weightferry.cache.partial_cleanup import remove_expired
from weightferry.cache.permissions import make_folder, touch
from weightferry.cache.trust import prepare_cache_folder
from weightferry.cache.usage import hold_source
from weightferry.errors import BadRequest

NOBODY = pwd.getpwnam("nobody")
OTHER = 4242


def as_user(work: Callable[[], object], *, groups: tuple[int, ...] = ()) -> str:
    """Call `work` as the user nobody, in a fork. Return its exception as text."""
    need(os.geteuid() == 0, "this test needs the right to become another user: run it as root")
    out, into = os.pipe()
    child = os.fork()
    if child == 0:
        text = ""
        try:
            os.setgroups(groups)
            os.setgid(NOBODY.pw_gid)
            os.setuid(NOBODY.pw_uid)
            work()
        except BaseException as error:  # noqa: BLE001 -- returned as text
            text = f"{type(error).__name__}: {error}"
        os.write(into, text.encode())
        os._exit(0)
    os.close(into)
    os.waitpid(child, 0)
    with os.fdopen(out) as result:
        return result.read()


@pytest.fixture
def place() -> Iterator[Path]:
    """A folder that every user may enter. Only root may enter pytest's own folders."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


def check(root: Path, *, groups: tuple[int, ...] = ()) -> str:
    return as_user(lambda: prepare_cache_folder(CacheLayout(root)), groups=groups)


def test_a_new_cache_is_private(tmp_path: Path) -> None:
    prepare_cache_folder(CacheLayout(tmp_path / "a/cache"))
    assert (tmp_path / "a/cache").stat().st_mode & 0o777 == 0o700
    prepare_cache_folder(CacheLayout(tmp_path / "a/cache"))


def test_a_folder_that_every_user_may_write_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    with pytest.raises(BadRequest, match="every user may write"):
        prepare_cache_folder(CacheLayout(tmp_path))
    tmp_path.chmod(0o1777)
    prepare_cache_folder(CacheLayout(tmp_path))


def test_another_users_folder_in_a_cache_that_every_user_may_write_to(place: Path) -> None:
    """Otherwise weightferry would trust the notes of another user."""
    root = place / "cache"
    (root / "verified").mkdir(parents=True)
    root.chmod(0o1777)
    os.chown(root / "verified", OTHER, OTHER)
    assert f"belongs to user {OTHER}" in check(root)
    os.chown(root / "verified", NOBODY.pw_uid, NOBODY.pw_gid)
    assert check(root) == ""


def test_new_files_follow_the_folder_and_not_the_umask(tmp_path: Path) -> None:
    for mode, folder, file in ((0o700, 0o700, 0o600), (0o2770, 0o2770, 0o660), (0o755, 0o755, 0o644)):
        root = tmp_path / f"{mode:o}"
        root.mkdir()
        root.chmod(mode)
        umask = os.umask(0o077)
        try:
            make_folder(root / "a/b")
            touch(root / "a/b/file")
        finally:
            os.umask(umask)
        seen = [stat.S_IMODE((root / path).stat().st_mode) for path in ("a", "a/b", "a/b/file")]
        assert seen == [folder, folder, file]


def test_a_folder_of_another_user(place: Path) -> None:
    root = place / "cache"
    root.mkdir()
    os.chown(root, OTHER, OTHER)
    assert f"belongs to user {OTHER}" in check(root)
    os.chown(root, 0, 0)
    assert check(root) == "", "a cache that root made is for every user"
    os.chown(root, NOBODY.pw_uid, OTHER)
    assert check(root) == ""


def test_a_folder_of_a_group(place: Path) -> None:
    root = place / "cache"
    root.mkdir()
    root.chmod(0o2770)
    os.chown(root, OTHER, OTHER)
    assert "belongs to user" in check(root)
    assert check(root, groups=(OTHER,)) == ""


def test_a_link_in_a_folder_that_every_user_may_write_to(place: Path) -> None:
    (place / "elsewhere").mkdir()
    os.chown(place / "elsewhere", NOBODY.pw_uid, NOBODY.pw_gid)
    common = place / "common"
    common.mkdir()
    common.chmod(0o1777)
    link = common / "cache"
    link.symlink_to(place / "elsewhere")
    os.lchown(link, OTHER, OTHER)
    assert f"made by user {OTHER} in a folder that every user may write to" in check(link)
    assert "in a folder that every user may write to" in check(link / "below")
    os.lchown(link, NOBODY.pw_uid, NOBODY.pw_gid)
    assert check(link) == ""


def test_a_private_cache_stays_private(place: Path) -> None:
    """Another user cannot read what root staged for itself."""
    root = place / "cache"
    prepare_cache_folder(CacheLayout(root))
    (root / "blob").write_bytes(b"secret")
    assert "PermissionError" in as_user((root / "blob").read_bytes)


class TestLinks:
    """A symbolic link that another user places in a cache is never followed."""

    @pytest.fixture
    def home(self, tmp_path: Path) -> Path:
        """Files that must not change."""
        (tmp_path / "home").mkdir()
        (tmp_path / "home/thesis").write_bytes(b"years")
        (tmp_path / "home/.notes").write_bytes(b"more")
        (tmp_path / "home/folder").mkdir()
        for path in (tmp_path / "home").iterdir():
            os.utime(path, (1, 1))
        return tmp_path / "home"

    @pytest.fixture
    def layout(self, tmp_path: Path) -> CacheLayout:
        for name in ("hub/models--o--bait", "partial", "verified", "used"):
            (tmp_path / "cache" / name).mkdir(parents=True)
        return CacheLayout(tmp_path / "cache")

    def test_no_file_is_removed_through_a_link(self, layout: CacheLayout, home: Path) -> None:
        for name in ("partial/x", "verified/x", "hub/models--o--bait/snapshots", "hub/models--o--bait/blobs", "hub/x"):
            (layout.root / name).symlink_to(home)
        remove_expired(layout, (), 0, LockSupport(), ["x"])
        evict(layout, -1)
        assert sorted(path.name for path in home.iterdir()) == [".notes", "folder", "thesis"]

    def test_no_file_is_made_through_a_link(self, layout: CacheLayout, home: Path) -> None:
        (layout.root / "probe.lock").symlink_to(home / "evil")
        (layout.root / "used/models--o--bait.lock").symlink_to(home / "evil")
        evict(layout, -1)
        hold_source(layout.used_lock("models--o--bait"), lambda: None)
        with pytest.raises(OSError, match="symbolic links"):
            touch(layout.probe_lock)
        assert not (home / "evil").exists()

    def test_partial_data_is_not_written_through_a_link(self, layout: CacheLayout, home: Path) -> None:
        (layout.partial / "m").mkdir()
        (layout.partial / "m/key").symlink_to(home / "thesis")
        PartialFile(layout.partial / "m/key", 3, "key").write(0, b"abc")
        assert (home / "thesis").read_bytes() == b"years"
        assert (layout.partial / "m/key").read_bytes() == b"abc"

    def test_a_cache_folder_that_another_user_linked(self, place: Path) -> None:
        root = place / "cache"
        root.mkdir()
        os.chown(root, NOBODY.pw_uid, NOBODY.pw_gid)
        (root / "hub").symlink_to("/tmp")
        os.lchown(root / "hub", OTHER, OTHER)
        assert f"is a symbolic link made by user {OTHER}" in check(root)
        os.lchown(root / "hub", NOBODY.pw_uid, NOBODY.pw_gid)
        assert check(root) == ""
