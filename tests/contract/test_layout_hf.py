"""The cache for Hub files is a Hugging Face cache: huggingface_hub reads it, and weightferry reads theirs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import (
    HfApi,
    constants,
    hf_hub_download,
    scan_cache_dir,
    snapshot_download,
    try_to_load_from_cache,
)
from huggingface_hub.utils import disable_progress_bars

import weightferry
from tests.contract.backends import contents, use_server
from tests.contract.hub_library import HUB_VERSION
from weightferry.errors import SourceNotFound
from weightferry.testing.hub import HubServer

WEIGHTS = os.urandom(200_000)
FILES = {"config.json": b"{}", "model.safetensors": WEIGHTS, "onnx/model.onnx": b"onnx" * 9, "copy.bin": WEIGHTS}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    disable_progress_bars()
    with HubServer() as server, monkeypatch.context() as patched:
        use_server(server, patched)
        server.add_repo("org/model", FILES)
        server.add_repo("org/data", {"rows.csv": b"1,2"}, repo_type="dataset")
        yield server
        # huggingface_hub keeps connections open. They must not outlive the server.
        use_server(server, patched)


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "cache"


class TestHuggingfaceHubReadsOurCache:
    @pytest.fixture(autouse=True)
    def _staged(self, hub: HubServer, cache: Path) -> None:
        self.folder = weightferry.stage("org/model", cache_dir=cache)
        self.commit = hub.commit("org/model")
        self.hub_cache = cache / "hub"

    def test_stage_returns_the_snapshot(self) -> None:
        assert self.folder == self.hub_cache / "models--org--model/snapshots" / self.commit
        assert contents(self.folder) == FILES

    def test_scan_has_no_warnings(self) -> None:
        info = scan_cache_dir(self.hub_cache)
        assert info.warnings == []
        (repo,) = info.repos
        (revision,) = repo.revisions
        assert (repo.repo_id, repo.repo_type, repo.nb_files) == ("org/model", "model", 3), "equal files share a blob"
        assert (revision.commit_hash, set(revision.refs)) == (self.commit, {"main"})
        assert {file.file_name for file in revision.files} == {Path(path).name for path in FILES}
        assert info.size_on_disk == sum(map(len, FILES.values())) - len(WEIGHTS)

    @pytest.mark.parametrize("revision", ["main", None, "commit"])
    def test_files_are_found_without_a_network(self, hub: HubServer, revision: str | None) -> None:
        revision = self.commit if revision == "commit" else revision
        hub.close()
        for path in FILES:
            found = try_to_load_from_cache("org/model", path, cache_dir=self.hub_cache, revision=revision)
            assert found == str(self.folder / path)
            got = hf_hub_download("org/model", path, cache_dir=self.hub_cache, revision=revision, local_files_only=True)
            assert got == found
        snapshot = snapshot_download("org/model", cache_dir=self.hub_cache, revision=revision, local_files_only=True)
        assert snapshot == str(self.folder)

    def test_it_downloads_nothing_again(self, hub: HubServer) -> None:
        hub.reset()
        assert snapshot_download("org/model", cache_dir=self.hub_cache, endpoint=hub.url) == str(self.folder)
        assert hub.content_bytes() == 0

    if HUB_VERSION >= (1, 1):  # the first with this check

        def test_checksums(self, hub: HubServer) -> None:
            found = HfApi(endpoint=hub.url).verify_repo_checksums("org/model", cache_dir=self.hub_cache)
            assert found.checked_count == len(FILES)
            assert (found.mismatches, found.extra_paths) == ([], [])
            assert not FILES.keys() & set(found.missing_paths), (
                "the oldest versions report folders as missing, for every cache"
            )

    def test_an_offline_process_with_the_cache_named_in_its_environment(self, hub: HubServer) -> None:
        hub.close()
        code = "from huggingface_hub import hf_hub_download as d; print(d('org/model', 'onnx/model.onnx'))"
        environ = {**os.environ, "HF_HUB_CACHE": str(self.hub_cache), "HF_HUB_OFFLINE": "1"}
        ran = subprocess.run([sys.executable, "-c", code], env=environ, capture_output=True, text=True, check=True)
        assert ran.stdout.strip() == str(self.folder / "onnx/model.onnx")

    def test_a_second_call_sends_one_request_and_no_content(self, hub: HubServer, cache: Path) -> None:
        hub.reset()
        assert weightferry.stage("org/model", cache_dir=cache) == self.folder
        assert hub.content_bytes() == 0
        assert len(hub.metadata_requests) == 1

    def test_a_branch_that_moved(self, hub: HubServer, cache: Path) -> None:
        hub.add_repo("org/model", FILES | {"config.json": b'{"new": 1}'})
        hub.reset()
        after = weightferry.stage("org/model", cache_dir=cache)
        assert hub.content_bytes() == len(b'{"new": 1}'), "only the changed file"
        assert contents(after)["config.json"] == b'{"new": 1}'
        assert contents(self.folder) == FILES, "the old snapshot stays"
        assert scan_cache_dir(self.hub_cache).warnings == []
        found = try_to_load_from_cache("org/model", "config.json", cache_dir=self.hub_cache)
        assert found == str(after / "config.json")


class TestHfCommands:
    @pytest.fixture(autouse=True)
    def _staged(self, hub: HubServer, cache: Path, tmp_path: Path) -> None:
        self.folder = weightferry.stage("org/model", cache_dir=cache)
        home = tmp_path / "home"
        home.mkdir()
        (home / ".check_for_update_done").touch()  # otherwise they send requests to PyPI
        cleared = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE"), "")
        places = {"HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_HUB_CACHE": str(cache / "hub")}
        self.environ = {**os.environ, **cleared, **places}

    def hf_cache(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        command = [str(Path(sys.executable).with_name("hf")), "cache", *arguments]
        return subprocess.run(command, env=self.environ, capture_output=True, text=True, check=False)

    if HUB_VERSION < (1, 1):

        def test_scan(self, hub: HubServer, cache: Path) -> None:
            hub.close()
            ran = self.hf_cache("scan", "--dir", str(cache / "hub"), "-vvv")
            assert ran.returncode == 0, ran.stderr
            assert self.folder.name in ran.stdout
            assert "warning" not in ran.stdout.lower()

    else:  # the first with these commands

        def test_ls(self, hub: HubServer, cache: Path) -> None:
            commit = hub.commit("org/model")
            hub.close()
            del self.environ["HF_HUB_CACHE"]
            for more, expected in ([], "model/org/model"), (["--revisions"], commit):
                ran = self.hf_cache("ls", "--cache-dir", str(cache / "hub"), "--quiet", *more)
                assert (ran.returncode, ran.stdout.split()) == (0, [expected]), ran.stderr

        def test_ls_as_a_table(self) -> None:
            ran = self.hf_cache("ls")
            assert ran.returncode == 0, ran.stderr
            assert "model/org/model" in ran.stdout

        def test_verify(self) -> None:
            ran = self.hf_cache("verify", "org/model")
            assert ran.returncode == 0, ran.stdout + ran.stderr
            assert "'org/model'" in ran.stdout

        @pytest.mark.parametrize("path", ["config.json", "model.safetensors"])
        def test_verify_finds_a_damaged_file(self, path: str) -> None:
            blob = (self.folder / path).resolve()
            blob.write_bytes(bytes(blob.stat().st_size))
            ran = self.hf_cache("verify", "org/model")
            assert ran.returncode == 1, ran.stdout + ran.stderr
            assert f"{path}: expected {blob.name} " in ran.stdout


class TestWeightferryReadsTheirCache:
    def test_a_snapshot_counts_as_cached(self, hub: HubServer, cache: Path) -> None:
        theirs = snapshot_download("org/model", cache_dir=cache / "hub", endpoint=hub.url)
        hub.reset()
        assert weightferry.stage("org/model", cache_dir=cache) == Path(theirs)
        assert hub.content_bytes() == 0

    def test_a_single_file_counts_as_cached(self, hub: HubServer, cache: Path) -> None:
        hf_hub_download("org/model", "model.safetensors", cache_dir=cache / "hub", endpoint=hub.url)
        hub.reset()
        folder = weightferry.stage("org/model", cache_dir=cache)
        assert hub.content_bytes() == sum(map(len, FILES.values())) - 2 * len(WEIGHTS)
        assert contents(folder) == FILES

    def test_a_damaged_blob_is_downloaded_again(self, hub: HubServer, cache: Path) -> None:
        theirs = Path(snapshot_download("org/model", cache_dir=cache / "hub", endpoint=hub.url))
        (theirs / "config.json").resolve().write_bytes(b"{!")  # same size, wrong bytes
        (theirs / "onnx/model.onnx").resolve().write_bytes(b"onnx")
        folder = weightferry.stage("org/model", cache_dir=cache)
        assert contents(folder) == FILES


@pytest.mark.parametrize("revision", ["v1.0", "refs/pr/1", "feature/x"])
def test_other_revisions_have_their_refs(hub: HubServer, cache: Path, revision: str) -> None:
    hub.add_repo("org/model", FILES | {"config.json": revision.encode()}, revision=revision)
    folder = weightferry.stage("org/model", revision=revision, cache_dir=cache)
    assert (folder / "config.json").read_text() == revision
    info = scan_cache_dir(cache / "hub")
    assert info.warnings == []
    assert {ref for repo in info.repos for ref in repo.refs} == {revision}
    assert try_to_load_from_cache("org/model", "config.json", cache / "hub", revision) == str(folder / "config.json")


def test_datasets(hub: HubServer, cache: Path) -> None:
    folder = weightferry.stage("hf://datasets/org/data", cache_dir=cache)
    found = try_to_load_from_cache("org/data", "rows.csv", cache / "hub", repo_type="dataset")
    assert found == str(folder / "rows.csv")
    assert hub.content_bytes() == 3


def test_a_snapshot_staged_with_patterns_can_be_completed(hub: HubServer, cache: Path) -> None:
    weightferry.stage("org/model", allow_patterns="*.json", cache_dir=cache)
    assert hub.content_bytes() == 2
    snapshot = snapshot_download("org/model", cache_dir=cache / "hub", endpoint=hub.url)
    assert contents(Path(snapshot)) == FILES


def test_a_failed_call_leaves_a_valid_cache(hub: HubServer, cache: Path) -> None:
    weightferry.stage("org/model", allow_patterns="*.json", cache_dir=cache)
    with pytest.raises(SourceNotFound, match="no revision 'nope'"):
        weightferry.stage("org/model", revision="nope", cache_dir=cache)
    assert scan_cache_dir(cache / "hub").warnings == []
    assert hub.url == constants.ENDPOINT
