"""`HubServer`, tested with the real client, huggingface_hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi, close_session, hf_hub_download, scan_cache_dir, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, get_session

from weightferry.testing.hub import Fault, HubOptions, HubServer

Download = Callable[..., bytes]

WEIGHTS = os.urandom(300_000)
CONFIG = b'{"hidden_size": 4}'
FILES = {
    "config.json": CONFIG,
    "model.safetensors": WEIGHTS,
    "onnx/model.onnx": b"onnx" * 9,
    "onnx/notes.md": b"# notes",
}
ODD_NAMES = ["a b.txt", "grüße/日本.bin", "x+y.json", "100%.txt", "50%25.bin", "#1.txt", "q?a=b&c.bin", "it's (1).txt"]


@pytest.fixture(autouse=True)
def _fresh_session() -> Iterator[None]:
    disable_progress_bars()
    yield
    close_session()


@pytest.fixture
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo("org/model", FILES)
        yield server


@pytest.fixture
def download(hub: HubServer, tmp_path: Path) -> Download:
    def run(path: str, repo_id: str = "org/model", token: str | bool = False, **options: Any) -> bytes:
        path_in_cache = hf_hub_download(
            repo_id, path, endpoint=hub.url, cache_dir=tmp_path / "cache", token=token, **options
        )
        return Path(path_in_cache).read_bytes()

    return run


def api(hub: HubServer, token: str | bool = False) -> HfApi:
    return HfApi(endpoint=hub.url, token=token)


class TestDownload:
    def test_a_git_file_is_redirected_on_the_same_host(self, hub: HubServer, download: Download) -> None:
        assert download("config.json") == CONFIG
        assert [(r.side, r.method, r.kind, r.status) for r in hub.requests] == [
            ("hub", "HEAD", "metadata", 307),
            ("hub", "HEAD", "metadata", 200),
            ("hub", "GET", "content", 200),
        ]

    def test_an_lfs_file_is_redirected_to_the_cdn(self, hub: HubServer, download: Download) -> None:
        assert download("model.safetensors") == WEIGHTS
        assert [(r.side, r.method, r.kind, r.status) for r in hub.requests] == [
            ("hub", "HEAD", "metadata", 302),
            ("cdn", "GET", "content", 200),
        ]

    def test_counts_are_exact(self, hub: HubServer, download: Download) -> None:
        for path, data in FILES.items():
            assert download(path) == data
            assert hub.content_bytes(path) == len(data)
        assert hub.content_bytes() == sum(map(len, FILES.values()))
        assert len(hub.metadata_requests) == sum(1 if path.endswith(("rs", "nx")) else 2 for path in FILES)
        hub.reset()
        assert hub.requests == []

    def test_the_token_never_reaches_the_cdn(self, hub: HubServer, download: Download) -> None:
        assert download("model.safetensors", token="hf_any") == WEIGHTS
        assert [(r.side, r.had_authorization) for r in hub.requests] == [("hub", True), ("cdn", False)]

    def test_the_cdn_can_have_another_name(self, tmp_path: Path) -> None:
        with HubServer(host="0.0.0.0", options=HubOptions(cdn_host="127.0.0.2")) as hub:
            hub.add_repo("org/model", FILES)
            path = hf_hub_download("org/model", "model.safetensors", endpoint=hub.url, cache_dir=tmp_path, token="hf_x")
            assert Path(path).read_bytes() == WEIGHTS
            assert hub.cdn_url.startswith("http://127.0.0.2:")
            assert [(r.side, r.had_authorization) for r in hub.requests] == [("hub", True), ("cdn", False)]

    def test_file_of_a_dataset_and_of_a_space(self, hub: HubServer, download: Download) -> None:
        hub.add_repo("org/model", {"data.parquet": b"rows"}, repo_type="dataset")
        hub.add_repo("org/app", {"app.py": b"import gradio"}, repo_type="space")
        assert download("data.parquet", repo_type="dataset") == b"rows"
        assert download("app.py", "org/app", repo_type="space") == b"import gradio"
        assert hub.content_bytes("datasets/org/model/data.parquet") == 4

    @pytest.mark.parametrize("path", ODD_NAMES)
    def test_odd_names(self, hub: HubServer, download: Download, path: str) -> None:
        hub.add_repo("org/odd", {path: path.encode()})
        assert download(path, "org/odd") == path.encode()
        assert hub.requests[-1].path.endswith(f"/{path}")
        assert [f.path for f in api(hub).get_paths_info("org/odd", [path])] == [path]
        assert path in [f.path for f in api(hub).list_repo_tree("org/odd", recursive=True)]

    def test_empty_file(self, hub: HubServer, download: Download) -> None:
        hub.add_repo("org/empty", {"empty.txt": b"", "empty.bin": b""})
        assert download("empty.txt", "org/empty") == download("empty.bin", "org/empty") == b""

    def test_text_is_compressed_with_the_option(self, tmp_path: Path) -> None:
        text = b'{"vocabulary": "' + b"a" * 9000 + b'"}'
        with HubServer(options=HubOptions(compress_text=True)) as hub:
            hub.add_repo("org/model", {"vocab.json": text})
            path_in_cache = hf_hub_download(
                "org/model", "vocab.json", endpoint=hub.url, cache_dir=tmp_path, token=False
            )
            assert Path(path_in_cache).read_bytes() == text
            assert 0 < hub.content_bytes() < 1000

    def test_snapshot(self, hub: HubServer, tmp_path: Path) -> None:
        folder = Path(
            snapshot_download(
                "org/model", endpoint=hub.url, cache_dir=tmp_path, token=False, allow_patterns=["*.json", "onnx/*"]
            )
        )
        downloaded = {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
        assert downloaded == {path: data for path, data in FILES.items() if path != "model.safetensors"}
        assert hub.content_bytes("model.safetensors") == 0

    def test_the_cache_is_valid_after_a_download(self, hub: HubServer, tmp_path: Path) -> None:
        snapshot_download("org/model", endpoint=hub.url, cache_dir=tmp_path, token=False)
        found = scan_cache_dir(tmp_path)
        assert not found.warnings
        assert [(repo.repo_id, repo.size_on_disk) for repo in found.repos] == [
            ("org/model", sum(map(len, FILES.values())))
        ]
        check = api(hub).verify_repo_checksums("org/model", cache_dir=tmp_path)
        assert (check.checked_count, check.mismatches, check.missing_paths) == (len(FILES), [], [])

    def test_eight_at_once(self, hub: HubServer, tmp_path: Path) -> None:
        hub.add_repo("org/many", {f"shard-{n}.bin": os.urandom(100_000 + n) for n in range(8)})
        barrier = threading.Barrier(8)

        def run(n: int) -> int:
            barrier.wait()
            path = hf_hub_download(
                "org/many", f"shard-{n}.bin", endpoint=hub.url, cache_dir=tmp_path / str(n), token=False
            )
            return Path(path).stat().st_size

        with ThreadPoolExecutor(8) as pool:
            assert list(pool.map(run, range(8))) == [100_000 + n for n in range(8)]
        assert hub.content_bytes() == sum(100_000 + n for n in range(8))


class TestApi:
    def test_model_info(self, hub: HubServer) -> None:
        info = api(hub).model_info("org/model", files_metadata=True)
        siblings = {sibling.rfilename: sibling for sibling in info.siblings or ()}
        assert (info.id, info.sha, info.private, info.gated) == ("org/model", hub.commit("org/model"), False, False)
        assert {path: sibling.size for path, sibling in siblings.items()} == {p: len(d) for p, d in FILES.items()}
        assert siblings["model.safetensors"].lfs is not None
        assert siblings["config.json"].lfs is None

    def test_model_info_without_file_metadata_and_by_fields(self, hub: HubServer) -> None:
        info = api(hub).model_info("org/model")
        assert info.siblings is not None
        assert {sibling.size for sibling in info.siblings} == {None}
        info = api(hub).model_info("org/model", expand=["sha"])
        assert (info.sha, info.siblings) == (hub.commit("org/model"), None)

    def test_tree_by_pages(self, hub: HubServer) -> None:
        files = {f"folder/{n:02}.json": b"{}" for n in range(7)}
        with HubServer(options=HubOptions(page_size=3)) as paged:
            paged.add_repo("org/model", {**files, "top.json": b"{}"})
            listed = [f.path for f in api(paged).list_repo_tree("org/model", recursive=True)]
            assert listed == ["folder", *files, "top.json"]
            assert len(paged.requests) == 3
            assert [f.path for f in api(paged).list_repo_tree("org/model")] == ["folder", "top.json"]
            assert [f.path for f in api(paged).list_repo_tree("org/model", "folder")] == list(files)

    def test_tree_expanded(self, hub: HubServer) -> None:
        listed = list(api(hub).list_repo_tree("org/model", recursive=True, expand=True))
        assert {f.last_commit.oid for f in listed if f.last_commit} == {hub.commit("org/model")}

    def test_tree_of_a_nested_folder(self, hub: HubServer) -> None:
        hub.add_repo("org/deep", {"a/b c/d.json": b"{}", "a/b c/e/f.json": b"{}"})
        assert [f.path for f in api(hub).list_repo_tree("org/deep", "a/b c")] == ["a/b c/d.json", "a/b c/e"]
        with pytest.raises(EntryNotFoundError):
            list(api(hub).list_repo_tree("org/deep", "a/x"))

    def test_paths_info_leaves_out_missing_paths(self, hub: HubServer) -> None:
        found = api(hub).get_paths_info("org/model", ["onnx", "missing", "config.json"])
        assert [(type(f).__name__, f.path) for f in found] == [("RepoFolder", "onnx"), ("RepoFile", "config.json")]

    def test_refs(self, hub: HubServer) -> None:
        hub.add_repo("org/model", {"a": b"1"}, revision="dev/x")
        hub.add_tag("org/model", "v1")
        refs = api(hub).list_repo_refs("org/model", include_pull_requests=True)
        assert {ref.name: ref.target_commit for ref in refs.branches} == {
            "main": hub.commit("org/model"),
            "dev/x": hub.commit("org/model", "dev/x"),
        }
        assert [(ref.ref, ref.target_commit) for ref in refs.tags] == [("refs/tags/v1", hub.commit("org/model"))]

    def test_existence(self, hub: HubServer) -> None:
        assert api(hub).repo_exists("org/model")
        assert not api(hub).repo_exists("org/other")
        assert api(hub).file_exists("org/model", "onnx/notes.md")
        assert not api(hub).file_exists("org/model", "onnx")
        assert not api(hub).revision_exists("org/model", "v9")

    def test_whoami(self, hub: HubServer) -> None:
        assert api(hub, "hf_any").whoami()["type"] == "user"

    @pytest.mark.skipif(not shutil.which("git"), reason="needs git")
    def test_ids_equal_those_of_git(self, hub: HubServer, tmp_path: Path) -> None:
        # Git sorts the folder "a" behind "a-b" and "a.txt".
        files = {"a.txt": b"1", "a/b.txt": b"2", "a-b": b"3", "a/c/d": b"", "grüße": b"4"}
        for path, data in files.items():
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_bytes(data)

        def git(*arguments: str) -> str:
            # quotePath would write names in octal.
            command = ["git", "-c", "core.quotePath=false", *arguments]
            return subprocess.run(command, cwd=tmp_path, check=True, capture_output=True, text=True).stdout

        git("init")
        git("add", ".")
        tree = git("write-tree").strip()
        rows = [line.split(maxsplit=3) for line in git("ls-tree", "-r", "-t", tree).splitlines()]
        hub.add_repo("org/git", tmp_path)
        listed = list(api(hub).list_repo_tree("org/git", recursive=True))
        assert {f.path: getattr(f, "blob_id", None) or getattr(f, "tree_id", None) for f in listed} == {
            path: oid for _, _, oid, path in rows
        }


class TestRevisions:
    def test_branch_tag_and_commit(self, hub: HubServer, download: Download) -> None:
        hub.add_repo("org/model", {"config.json": b"dev"}, revision="dev/x")
        hub.add_tag("org/model", "v1", revision="dev/x")
        for revision in ("dev/x", "v1", hub.commit("org/model", "v1")):
            assert download("config.json", revision=revision) == b"dev"
        assert download("config.json") == CONFIG

    def test_the_old_commit_of_a_changed_branch_stays_readable(self, hub: HubServer, download: Download) -> None:
        old = hub.commit("org/model")
        hub.add_tag("org/model", "v1")
        hub.add_repo("org/model", {"config.json": b"new"})
        assert hub.commit("org/model") != old
        assert download("config.json") == b"new"
        assert download("config.json", revision=old) == download("config.json", revision="v1") == CONFIG
        assert api(hub).model_info("org/model", revision=old).sha == old

    def test_equal_content_is_the_same_commit(self, hub: HubServer) -> None:
        with HubServer() as other:
            other.add_repo("a/b", FILES, repo_type="dataset")
            assert other.commit("a/b", repo_type="dataset") == hub.commit("org/model")

    def test_a_folder_is_served_in_its_current_state(self, tmp_path: Path, hub: HubServer, download: Download) -> None:
        (tmp_path / "served").mkdir()
        weights = tmp_path / "served/model.bin"
        weights.write_bytes(b"one")
        hub.add_repo("org/live", tmp_path / "served")
        old = hub.commit("org/live")
        assert download("model.bin", "org/live") == b"one"
        weights.write_bytes(b"three")
        assert hub.commit("org/live") != old
        assert download("model.bin", "org/live") == b"three"
        shutil.rmtree(tmp_path / "cache")
        with pytest.raises(HfHubHTTPError, match="changed on disk"):
            download("model.bin", "org/live", revision=old)

    def test_a_root_of_repositories(self, tmp_path: Path) -> None:
        for path in ("org/model/config.json", "datasets/org/data/a.csv", "org/model/.git/HEAD"):
            (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / path).write_text(path)
        with HubServer(tmp_path) as hub:
            assert [f.path for f in api(hub).list_repo_tree("org/model")] == ["config.json"]
            assert [s.rfilename for s in api(hub).dataset_info("org/data").siblings or ()] == ["a.csv"]
            assert not api(hub).repo_exists("datasets/org")
            (tmp_path / "org/late").mkdir()
            assert api(hub).repo_exists("org/late")


class TestErrors:
    def test_missing_repositories_revisions_and_files(self, hub: HubServer, download: Download) -> None:
        with pytest.raises(RepositoryNotFoundError):
            download("config.json", "org/missing")
        with pytest.raises(RepositoryNotFoundError):
            download("config.json", "org/missing", token="hf_any")
        assert [r.status for r in hub.requests] == [401, 404]
        with pytest.raises(RevisionNotFoundError):
            download("config.json", revision="missing")
        with pytest.raises(EntryNotFoundError):
            download("missing.json")
        with pytest.raises(RevisionNotFoundError):
            list(api(hub).list_repo_tree("org/model", revision="missing"))

    def test_private(self, hub: HubServer, download: Download) -> None:
        hub.add_repo("org/private", FILES, private=True, allowed_tokens=["hf_in"])
        hub.add_repo("org/other", FILES, private=True, allowed_tokens=["hf_out"])
        assert download("config.json", "org/private", token="hf_in") == CONFIG
        assert api(hub, "hf_in").model_info("org/private").private
        for token in (False, "hf_out"):
            with pytest.raises(RepositoryNotFoundError):
                api(hub, token).model_info("org/private")

    def test_gated(self, hub: HubServer, download: Download) -> None:
        hub.add_repo("org/gated", FILES, gated=True, allowed_tokens=["hf_in"])
        hub.add_repo("org/other", FILES, gated="auto", allowed_tokens=["hf_out"])
        for token, status in ((False, 401), ("hf_out", 403)):
            with pytest.raises(GatedRepoError) as caught:
                download("model.safetensors", "org/gated", token=token)
            assert caught.value.response.status_code == status
            with pytest.raises(GatedRepoError):
                api(hub, token).auth_check("org/gated")
        assert download("model.safetensors", "org/gated", token="hf_in") == WEIGHTS
        # The metadata is public.
        assert api(hub).model_info("org/gated").gated == "manual"
        assert api(hub).model_info("org/other").gated == "auto"
        assert list(api(hub).list_repo_tree("org/gated"))

    def test_an_invalid_token_is_refused_for_a_public_repository(self, tmp_path: Path) -> None:
        with HubServer(tokens=["hf_valid"]) as hub:
            hub.add_repo("org/model", FILES)
            with pytest.raises(HfHubHTTPError, match="Invalid credentials in Authorization header") as caught:
                api(hub, "hf_wrong").model_info("org/model")
            assert not isinstance(caught.value, RepositoryNotFoundError)
            with pytest.raises(HfHubHTTPError, match="Invalid user token"):
                api(hub, "hf_wrong").whoami()
            assert api(hub, "hf_valid").model_info("org/model").sha

    def test_invalid_arguments(self, hub: HubServer, tmp_path: Path) -> None:
        for repo_id in ("model", "a/b/c", "../x", "api/x", "org/.."):
            with pytest.raises(ValueError, match="must be org/name"):
                hub.add_repo(repo_id, {})
        for path in ("../x", "/x", "a//b", "a/./b", ""):
            with pytest.raises(ValueError, match="not a path"):
                hub.add_repo("org/x", {path: b""})
        with pytest.raises(ValueError, match="has the name of a folder"):
            hub.add_repo("org/x", {"a": b"", "a/b": b""})
        with pytest.raises(NotADirectoryError):
            hub.add_repo("org/x", tmp_path / "missing")
        with pytest.raises(LookupError):
            hub.commit("org/x")


class TestFaults:
    def test_the_client_retries_a_busy_hub(self, hub: HubServer) -> None:
        hub.faults.add(Fault(path_suffix="/tree/main", status=503, headers={"Retry-After": "0"}))
        assert list(api(hub).list_repo_tree("org/model"))
        assert [r.status for r in hub.requests] == [503, 200]
        assert hub.faults.left == []

    def test_a_cut_download_is_resumed(
        self, hub: HubServer, download: Download, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        # huggingface_hub loses data below its chunk size (10 MB), and requests it again from the start.
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
        hub.faults.add(Fault(kind="content", cut_after=100_000))
        assert download("model.safetensors") == WEIGHTS
        assert [(r.range, r.status, r.body_bytes) for r in hub.requests if r.kind == "content"] == [
            (None, 200, 100_000),
            ("bytes=100000-", 206, 200_000),
        ]

    def test_the_client_does_not_detect_a_damaged_byte(self, hub: HubServer, download: Download) -> None:
        # huggingface_hub compares only sizes; weightferry therefore computes the checksum.
        hub.faults.add(Fault(corrupt_at=123))
        data = download("model.safetensors")
        assert [n for n, (a, b) in enumerate(zip(data, WEIGHTS, strict=True)) if a != b] == [123]

    def test_expired_urls(self, hub: HubServer, tmp_path: Path) -> None:
        url = f"{hub.url}/org/model/resolve/main/model.safetensors"
        link = get_session().head(url, follow_redirects=False).headers["Location"]
        assert get_session().get(link).content == WEIGHTS
        hub.expire_links()
        assert get_session().get(link).status_code == 403
        assert get_session().get(url).content == WEIGHTS


def test_an_empty_file_is_served_without_an_error(
    hub: HubServer, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    hub.add_repo("org/empty", {"empty.txt": b""})
    path = hf_hub_download("org/empty", "empty.txt", endpoint=hub.url, cache_dir=tmp_path)
    assert Path(path).read_bytes() == b""
    assert "failed" not in capfd.readouterr().err
