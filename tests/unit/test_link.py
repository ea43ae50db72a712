"""The last phase: where a rank finds things, the links, and that it can open what it was given."""

from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import pytest

from tests.unit.doubles import FakeMonitor, manifest_of
from weightferry.cache.layout import CacheLayout
from weightferry.errors import CollectError, IntegrityError, SourceNotFound
from weightferry.origins.pin_sources import RequestedFiles, Resolution, pin_sources
from weightferry.origins.registry import origin_for
from weightferry.phases.job_request import RankRequest
from weightferry.phases.link import (
    LinkPlan,
    VisibilityCheck,
    check_readable,
    compare_first_blocks,
    make_links,
    read_first_blocks,
)
from weightferry.settings import Settings
from weightferry.sources import SourceRequest
from weightferry.testing.origin import FakeOrigin


class Local:
    """Links to local sources: the whole phase without a cache."""

    def __init__(self, root: Path, settings: Settings, layout: CacheLayout) -> None:
        self.source, self.into, self.settings, self.layout = root / "source", root / "into", settings, layout
        for path, content in {"a.ckpt": b"aaa", "sub/b.ckpt": b"bbbb", "sub/deep/c.bin": b"c"}.items():
            (self.source / path).parent.mkdir(parents=True, exist_ok=True)
            (self.source / path).write_bytes(content)

    def show(
        self, into: Path | None = None, suffix: str | None = None, **requests: SourceRequest
    ) -> tuple[LinkPlan, Resolution]:
        resolved = pin_sources(list(requests.values()), self.settings, FakeMonitor(), origin_for)
        return LinkPlan.of(RankRequest(requests, into, suffix), resolved, self.layout), resolved

    def link(self, into: Path | None = None, suffix: str | None = None, **requests: SourceRequest) -> dict[str, Path]:
        plan, resolved = self.show(into, suffix, **requests)
        make_links(plan)
        check_readable(plan, resolved, VisibilityCheck())
        return dict(plan.paths)


@pytest.fixture
def local(tmp_path: Path, settings: Settings, layout: CacheLayout) -> Local:
    return Local(tmp_path, settings, layout)


class TestPaths:
    def test_no_links(self, local: Local) -> None:
        paths = local.link(
            x=SourceRequest.of(local.source, "sub/b.ckpt"),
            y=SourceRequest.of(local.source),
            z=SourceRequest.of(local.source, "sub"),
        )
        assert paths == {"x": local.source / "sub/b.ckpt", "y": local.source, "z": local.source / "sub"}

    def test_named_links(self, local: Local) -> None:
        paths = local.link(
            local.into, ".ckpt", x=SourceRequest.of(local.source, "sub/b.ckpt"), y=SourceRequest.of(local.source, "sub")
        )
        assert paths == {"x": local.into / "x.ckpt", "y": local.into / "y.ckpt"}
        assert os.readlink(paths["x"]) == str(local.source / "sub/b.ckpt")
        assert (paths["y"] / "deep/c.bin").read_bytes() == b"c"

    def test_a_folders_files_under_their_own_paths(self, local: Local) -> None:
        assert local.link(local.into, x=SourceRequest.of(local.source)) == {"x": local.into}
        assert (local.into / "sub/deep/c.bin").is_symlink()
        assert not (local.into / "sub").is_symlink()
        local.link(local.into, x=SourceRequest.of(local.source, "sub"))
        assert (local.into / "deep/c.bin").read_bytes() == b"c"

    def test_a_single_file_under_its_name(self, local: Local) -> None:
        assert local.link(local.into, x=SourceRequest.of(local.source, "sub/b.ckpt")) == {"x": local.into / "b.ckpt"}
        assert local.link(local.into, x=SourceRequest.of(local.source / "a.ckpt")) == {"x": local.into / "a.ckpt"}
        assert sorted(path.name for path in local.into.iterdir()) == ["a.ckpt", "b.ckpt"]

    def test_one_file_under_two_names(self, local: Local) -> None:
        request = SourceRequest.of(local.source, "a.ckpt")
        paths = local.link(local.into, ".ckpt", x=request, y=request)
        assert paths["x"].read_bytes() == paths["y"].read_bytes() == b"aaa"


class TestExisting:
    def test_only_what_differs_is_replaced(self, local: Local) -> None:
        requests = {"x": SourceRequest.of(local.source, "a.ckpt"), "y": SourceRequest.of(local.source, "sub/b.ckpt")}
        paths = local.link(local.into, ".ckpt", **requests)
        before = {name: path.lstat().st_ino for name, path in paths.items()}
        paths["y"].unlink()
        paths["y"].symlink_to("elsewhere")
        local.link(local.into, ".ckpt", **requests)
        assert paths["x"].lstat().st_ino == before["x"]
        assert paths["y"].read_bytes() == b"bbbb"

    @pytest.mark.parametrize(("content", "kept"), [(b"aaa", True), (b"aab", False), (b"aaaa", False)])
    def test_a_real_file_stays_when_it_is_equal(self, local: Local, content: bytes, kept: bool) -> None:
        local.into.mkdir()
        (local.into / "x.ckpt").write_bytes(content)
        local.link(local.into, ".ckpt", x=SourceRequest.of(local.source, "a.ckpt"))
        assert (local.into / "x.ckpt").is_symlink() != kept
        assert (local.into / "x.ckpt").read_bytes() == b"aaa"

    def test_a_source_in_the_folder_of_links_is_not_linked_to_itself(self, local: Local) -> None:
        request = SourceRequest.of(local.source, "a.ckpt")
        assert local.link(local.source, ".ckpt", a=request)["a"].read_bytes() == b"aaa"
        assert not (local.source / "a.ckpt").is_symlink()

    def test_nor_a_link_there_from_an_earlier_run(self, local: Local, tmp_path: Path) -> None:
        paths = local.link(local.into, ".ckpt", x=SourceRequest.of(local.source, "a.ckpt"))
        (tmp_path / "alias").symlink_to(local.into)
        for folder in (local.into, tmp_path / "alias"):
            local.link(local.into, ".ckpt", x=SourceRequest.of(folder, "x.ckpt"))
            assert os.readlink(paths["x"]) == str(local.source / "a.ckpt")


class TestReadable:
    def test_every_link_is_opened(self, local: Local) -> None:
        request = SourceRequest.of(local.source, "a.ckpt")
        plan, resolved = local.show(local.into, ".ckpt", x=request, y=request)
        make_links(plan)
        for name in "xy":
            plan.paths[name].unlink()
            with pytest.raises(SourceNotFound, match="on every node") as raised:
                check_readable(plan, resolved, VisibilityCheck())
            assert raised.value.subject == str(plan.paths[name])
            make_links(plan)
        check_readable(plan, resolved, VisibilityCheck())

    @pytest.mark.parametrize("into", [None, "into"])
    def test_another_size_for_this_rank(self, local: Local, into: str | None) -> None:
        plan, resolved = local.show(local.into if into else None, x=SourceRequest.of(local.source))
        make_links(plan)
        (local.source / "sub/deep/c.bin").write_bytes(b"changed")
        with pytest.raises(CollectError, match="has 7 bytes for this rank, 1 were expected"):
            check_readable(plan, resolved, VisibilityCheck())

    def test_a_file_that_this_rank_may_not_read(self, local: Local, monkeypatch: pytest.MonkeyPatch) -> None:
        plan, resolved = local.show(x=SourceRequest.of(local.source, "a.ckpt"))

        def refuse(self: Path, mode: str = "r") -> None:
            raise PermissionError(13, "Permission denied", str(self), None, mode)

        monkeypatch.setattr(Path, "open", refuse)
        with pytest.raises(PermissionError) as raised:
            check_readable(plan, resolved, VisibilityCheck())
        assert getattr(raised.value, "_weightferry_subject", "") == str(local.source / "a.ckpt")


class TestReadBack:
    """Of what was staged, every rank reads the first block too."""

    @pytest.fixture
    def staged(self, tmp_path: Path) -> tuple[LinkPlan, Resolution, CacheLayout]:
        layout, origin = CacheLayout(tmp_path / "cache"), FakeOrigin({"m.bin": b"abc"})
        request = SourceRequest.of("s3://bucket/model/m.bin")
        manifest = manifest_of(origin)
        pinned, file = next(manifest.staged())
        layout.pointer(pinned, file).parent.mkdir(parents=True)
        layout.pointer(pinned, file).write_bytes(b"abc")
        resolved = Resolution(manifest, {request: RequestedFiles(0, "m.bin", ("m.bin",))})
        return LinkPlan.of(RankRequest({"x": request}), resolved, layout), resolved, layout

    def test_the_beginning_counts_not_only_the_size(self, staged) -> None:
        plan, resolved, layout = staged
        check = VisibilityCheck(read_first_blocks(layout, resolved.manifest))
        check_readable(plan, resolved, check)
        plan.paths["x"].write_bytes(b"abX")
        with pytest.raises(IntegrityError, match="this rank reads other first bytes"):
            check_readable(plan, resolved, check)

    def test_leaders_compare_what_they_see(self, staged) -> None:
        _, resolved, layout = staged
        blocks = read_first_blocks(layout, resolved.manifest)
        assert compare_first_blocks(resolved.manifest, {0: blocks, 1: None, 2: blocks}) == blocks
        with pytest.raises(IntegrityError, match="ranks 0 and 2 read different bytes"):
            compare_first_blocks(resolved.manifest, {0: blocks, 2: (1,)})

    @pytest.mark.parametrize("number", [errno.ENOENT, errno.ESTALE])
    def test_a_file_that_shows_late(self, staged, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
        plan, resolved, layout = staged
        blocks = read_first_blocks(layout, resolved.manifest)
        opens, left = Path.open, [3]

        def late(path: Path, *args: Any, **options: Any) -> Any:
            left[0] -= 1
            if left[0] >= 0:
                raise OSError(number, os.strerror(number), str(path))
            return opens(path, *args, **options)

        monkeypatch.setattr(Path, "open", late)
        check_readable(plan, resolved, VisibilityCheck(blocks, timeout=30.0))
        left[0] = 1_000_000
        with pytest.raises((SourceNotFound, OSError)):
            check_readable(plan, resolved, VisibilityCheck(blocks, timeout=0.1))
