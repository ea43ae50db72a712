"""Resolving requests into a manifest: one call for each root, patterns, and the files of each request."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

from tests.unit.doubles import FakeMonitor
from weightferry.errors import BadRequest, CollectError, OriginError, SourceNotFound
from weightferry.origins.base import TransientOriginError
from weightferry.origins.pin_sources import Resolution, manifest_entries, pin_sources
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings
from weightferry.sources import SourceRequest
from weightferry.testing.origin import FakeOrigin, Fault

FILES = {"config.json": b"{}", "m.bin": b"123", "onnx/a.onnx": b"1", "onnx/b.txt": b"22", "onnx2/c.onnx": b"4"}


class Resolver:
    def __init__(self, settings: Settings, monitor: FakeMonitor) -> None:
        self.origin, self.settings, self.monitor = FakeOrigin(FILES), settings, monitor

    def __call__(self, *requests: SourceRequest) -> Resolution:
        return pin_sources(requests, self.settings, self.monitor, self.origin.factory)


@pytest.fixture
def resolver(settings: Settings, monitor: FakeMonitor) -> Resolver:
    return Resolver(settings, monitor)


def test_one_call_for_all_files_of_a_root(resolver: Resolver) -> None:
    requests = [
        SourceRequest.of("hf://org/m", "m.bin"),
        SourceRequest.of("org/m", "config.json"),
        SourceRequest.of("hf://org/m/onnx"),
    ]
    got = resolver(*requests)
    assert resolver.origin.resolves == [("org/m", ("m.bin", "config.json", "onnx"))]
    (pinned,) = got.manifest.sources
    assert {file.path for file in pinned.files} == {"m.bin", "config.json", "onnx/a.onnx", "onnx/b.txt"}
    assert [got.found[request].path for request in requests] == ["m.bin", "config.json", "onnx"]
    assert [got.found[request].files for request in requests] == [
        ("m.bin",),
        ("config.json",),
        ("onnx/a.onnx", "onnx/b.txt"),
    ]


def test_one_source_for_each_revision_and_root(resolver: Resolver) -> None:
    got = resolver(
        SourceRequest.of("hf://org/m@a"),
        SourceRequest.of("hf://org/m@b"),
        SourceRequest.of("s3://bucket/m"),
        SourceRequest.of("org/n"),
    )
    assert [root for root, _ in resolver.origin.resolves] == ["org/m", "org/m", "s3://bucket/m", "org/n"]
    assert [files.source for files in got.found.values()] == [0, 1, 2, 3]


def test_a_path_requested_twice_is_resolved_once(resolver: Resolver) -> None:
    resolver(
        SourceRequest.of("org/m", "m.bin"),
        SourceRequest.of("org/m/m.bin"),
        SourceRequest.of("org/m", "m.bin", allow="*"),
    )
    assert resolver.origin.resolves == [("org/m", ("m.bin",))]


class TestPatterns:
    @pytest.mark.parametrize(
        ("allow", "ignore", "kept"),
        [
            (None, None, set(FILES)),
            ("*.onnx", None, {"onnx/a.onnx", "onnx2/c.onnx"}),
            (["*.json", "m*"], None, {"config.json", "m.bin"}),
            (None, ["onnx/*", "onnx2/*"], {"config.json", "m.bin"}),
            ("onnx/", "*.txt", {"onnx/a.onnx"}),
        ],
    )
    def test_as_in_snapshot_download(self, resolver: Resolver, allow, ignore, kept: set[str]) -> None:
        request = SourceRequest.of("org/m", allow=allow, ignore=ignore)
        got = resolver(request)
        assert set(got.found[request].files) == kept
        assert {file.path for file in manifest_entries(got.found[request], got.manifest)} == kept
        assert {file.path for file in got.manifest.sources[0].files} == kept, "no other file is staged"

    def test_no_match_is_an_error(self, resolver: Resolver) -> None:
        with pytest.raises(BadRequest, match="none of its 5 files matches"):
            resolver(SourceRequest.of("org/m", allow="*.gguf"))

    def test_a_folder_is_not_a_name_prefix(self, resolver: Resolver) -> None:
        request = SourceRequest.of("org/m", "onnx")
        assert resolver(request).found[request].files == ("onnx/a.onnx", "onnx/b.txt")


def test_transient_errors_are_retried(resolver: Resolver) -> None:
    resolver.origin.faults.append(Fault(on="resolve", times=2, error=TransientOriginError("503")))
    resolver(SourceRequest.of("org/m"))
    assert len(resolver.origin.resolves) == 3
    resolver.origin.faults.append(Fault(on="resolve", times=None, error=TransientOriginError("503")))
    with pytest.raises(OriginError, match="attempts in a row"):
        resolver(SourceRequest.of("org/m"))


def test_a_missing_file(resolver: Resolver) -> None:
    with pytest.raises(SourceNotFound, match=r"'m\.bim' in the source; did you mean m\.bin"):
        resolver(SourceRequest.of("org/m", "m.bim"))


def test_an_error_without_a_subject_gets_the_source(resolver: Resolver) -> None:
    resolver.origin.faults.append(Fault(on="resolve", error=OSError(5, "Input/output error")))
    with pytest.raises(OSError, match="Input/output") as raised:
        resolver(SourceRequest.of("hf://org/m", "m.bin"))
    assert getattr(raised.value, "_weightferry_subject", "") == "hf://org/m/m.bin"


def test_an_invalid_source_makes_no_call(resolver: Resolver) -> None:
    with pytest.raises(BadRequest):
        resolver(SourceRequest.of("org/m", "m.bin"), SourceRequest.of("org/m", "../x"))
    assert resolver.origin.resolves == []


class TestLog:
    def test_guesses_are_logged(
        self, resolver: Resolver, tmp_path: Path, caplog, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        caplog.set_level(logging.INFO)
        resolver(SourceRequest.of("org/m"))
        assert "org/m: no local folder of this name; using the Hugging Face Hub repository" in caplog.text
        caplog.clear()
        Path("org/m").mkdir(parents=True)
        resolver(SourceRequest.of("org/m"))
        assert "org/m: using the local folder" in caplog.text
        caplog.clear()
        resolver(SourceRequest.of("hf://org/m"))
        assert caplog.text == ""


@pytest.mark.parametrize("scheme", ["nosuchscheme", "python"])
def test_an_unknown_scheme(settings: Settings, monitor: FakeMonitor, scheme: str) -> None:
    with pytest.raises(BadRequest, match=scheme):
        pin_sources([SourceRequest.of(f"{scheme}://x/y")], settings, monitor)


def test_a_missing_package_is_named_with_its_pip_command(
    settings: Settings, monitor: FakeMonitor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weightferry.origins.fsspec.url_to_fs", _not_installed)
    with pytest.raises(CollectError, match=r"pip install 'weightferry\[s3\]'"):
        pin_sources([SourceRequest.of("s3://bucket/y")], settings, monitor)


def _not_installed(_: str) -> None:
    raise ImportError("Install s3fs to access S3")


def test_every_scheme_has_an_origin(settings: Settings) -> None:
    kinds = {scheme: type(origin_for(scheme, settings)).__name__ for scheme in ("hf", "https", "file", "s3")}
    assert kinds == {"hf": "HubOrigin", "https": "HttpOrigin", "file": "FilesystemOrigin", "s3": "FsspecOrigin"}
