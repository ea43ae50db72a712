"""Parsing of sources: every valid form, and invalid texts."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from weightferry.errors import BadRequest
from weightferry.sources import FetchFrom, FetchSource, Source, SourceLike, SourceRequest, parse_source, safe_path

HERE = Path.cwd()


def parse(
    source: SourceLike, filename: str = "", *, folders: tuple[str, ...] = (), revision: str | None = None
) -> Source:
    return parse_source(SourceRequest.of(source, filename, revision=revision), lambda text: text in folders)


@pytest.mark.parametrize(
    ("text", "root", "path", "revision", "repo_type"),
    [
        ("org/name", "org/name", "", None, "model"),
        ("org/name/", "org/name", "", None, "model"),
        ("gpt2", "gpt2", "", None, "model"),
        ("org/name/onnx/m.bin", "org/name", "onnx/m.bin", None, "model"),
        ("org/name@v1.0", "org/name", "", "v1.0", "model"),
        ("hf://org/name", "org/name", "", None, "model"),
        ("hf://gpt2", "gpt2", "", None, "model"),
        ("hf://gpt2@main/config.json", "gpt2", "config.json", "main", "model"),
        ("hf://org/name@v1/onnx/m.bin", "org/name", "onnx/m.bin", "v1", "model"),
        ("hf://org/name@refs%2Fpr%2F12/m.bin", "org/name", "m.bin", "refs/pr/12", "model"),
        ("hf://datasets/org/name@main/data", "org/name", "data", "main", "dataset"),
        ("hf://spaces/org/name", "org/name", "", None, "space"),
        ("hf://models/org/name", "org/name", "", None, "model"),
        ("HF://org/a.b-c_d", "org/a.b-c_d", "", None, "model"),
        ("hf://org/name/a b+c%20#d?.bin", "org/name", "a b+c%20#d?.bin", None, "model"),
    ],
)
def test_hub(text: str, root: str, path: str, revision: str | None, repo_type: str) -> None:
    assert parse(text) == Source("hf", root, path, revision, repo_type)
    assert parse(text).guessed == ("://" not in text)


@pytest.mark.parametrize(
    ("text", "root", "path", "query"),
    [
        ("https://host/a/b/m.ckpt", "https://host/a/b", "m.ckpt", ""),
        ("http://host:8080/m.ckpt", "http://host:8080", "m.ckpt", ""),
        ("HTTPS://host/m.ckpt", "https://host", "m.ckpt", ""),
        ("https://host/a%20b/c%20d.ckpt", "https://host/a%20b", "c d.ckpt", ""),
        ("https://h/m.ckpt?X-Amz-Signature=s/e&id=1", "https://h", "m.ckpt", "X-Amz-Signature=s/e&id=1"),
        ("https://user:pw@host/m.ckpt", "https://user:pw@host", "m.ckpt", ""),
    ],
)
def test_http(text: str, root: str, path: str, query: str) -> None:
    assert parse(text) == Source(text.partition(":")[0].lower(), root, path, query=query)


def test_http_file_below_a_folder() -> None:
    assert parse("https://host/dir/", "m.ckpt") == Source("https", "https://host/dir", "m.ckpt")
    assert parse("https://host/dir?sig=abc", "m.ckpt") == Source("https", "https://host/dir", "m.ckpt", query="sig=abc")
    assert parse("https://host/dir", "m.ckpt?sig=abc") == Source("https", "https://host/dir", "m.ckpt", query="sig=abc")


@pytest.mark.parametrize(
    ("text", "scheme", "root"),
    [
        ("s3://bucket/a/m.ckpt", "s3", "s3://bucket/a/m.ckpt"),
        ("gs://bucket/a//", "gs", "gs://bucket/a"),
        ("memory://", "memory", "memory://"),
        ("zip://a/m.ckpt::s3://bucket/z.zip", "zip", "zip://a/m.ckpt::s3://bucket/z.zip"),
        ("simplecache::s3://bucket/m.ckpt", "simplecache", "simplecache::s3://bucket/m.ckpt"),
    ],
)
def test_fsspec(text: str, scheme: str, root: str) -> None:
    assert parse(text) == Source(scheme, root)
    assert parse(text, "m.ckpt") == Source(scheme, root, "m.ckpt")


@pytest.mark.parametrize(
    ("text", "root"),
    [
        ("/data/m", "/data/m"),
        ("./m", str(HERE / "m")),
        ("../m", str(HERE / "../m")),
        (".", str(HERE)),
        ("~/m", str(Path.home() / "m")),
        ("file:///data/a%20b%23", "/data/a b#"),
        ("file://localhost/data", "/data"),
        (Path("org/name"), str(HERE / "org/name")),
        (Path("/data"), "/data"),
    ],
)
def test_local(text: SourceLike, root: str) -> None:
    assert parse(text) == Source("file", root)
    assert parse(text, "m.ckpt") == Source("file", root, "m.ckpt")


def test_the_file_name_of_a_file_url_is_percent_encoded() -> None:
    assert parse("file:///a", "b%20c.ckpt") == Source("file", "/a", "b c.ckpt")


@pytest.mark.parametrize("text", ["org/name", "gpt2", "org/name/onnx"])
def test_an_existing_local_folder_wins(text: str) -> None:
    assert parse(text, folders=(text,)) == Source("file", str(HERE / text))
    assert parse(f"hf://{text}", folders=(text, f"hf://{text}")).scheme == "hf"
    assert parse(FetchSource(FetchFrom.HUGGING_FACE, text), folders=(text,)).scheme == "hf"


class TestFetchSource:
    @pytest.mark.parametrize(
        ("kind", "text", "scheme"),
        [
            (FetchFrom.LOCAL, "org/name", "file"),
            (FetchFrom.LOCAL, "file:///org/name", "file"),
            (FetchFrom.HUGGING_FACE, "org/name", "hf"),
            (FetchFrom.HUGGING_FACE, "hf://org/name", "hf"),
            (FetchFrom.URI, "https://host/m", "https"),
            (FetchFrom.URI, "s3://bucket/m", "s3"),
            (FetchFrom.URI, "file:///org/name", "file"),
        ],
    )
    def test_the_kind_decides(self, kind: FetchFrom, text: str, scheme: str) -> None:
        found = parse(FetchSource(kind, text))
        assert found.scheme == scheme
        assert not found.guessed
        if scheme == "file":
            assert found.root in ("/org/name", str(HERE / "org/name"))

    @pytest.mark.parametrize(
        ("kind", "text"),
        [
            (FetchFrom.URI, "org/name"),
            (FetchFrom.URI, "hf://org/name"),
            (FetchFrom.HUGGING_FACE, "https://host/m"),
            (FetchFrom.HUGGING_FACE, "/data/m"),
            (FetchFrom.HUGGING_FACE, "file:///data/m"),
        ],
    )
    def test_contradictions(self, kind: FetchFrom, text: str) -> None:
        with pytest.raises(BadRequest):
            parse(FetchSource(kind, text))


class TestPathsOutsideTheSource:
    NAMES = ("../../x", "..", "a/../../x", "/etc/passwd", "..\\x", "a\\..\\x", "a/..", "/")

    @pytest.mark.parametrize("name", NAMES)
    @pytest.mark.parametrize("root", ["org/name", "hf://org/name@main", "s3://bucket/a", "/data", "file:///data"])
    def test_a_file_stays_below_its_source(self, root: str, name: str) -> None:
        with pytest.raises(BadRequest):
            parse(root, name)

    @pytest.mark.parametrize(
        "name", ["../../x", "%2e%2e/x", "..%2F..%2Fx", "%2E%2E%2fx", "a%5c..%5cx", "..\\x", "x%00y"]
    )
    def test_http(self, name: str) -> None:
        with pytest.raises(BadRequest):
            parse("https://host/dir", name)
        with pytest.raises(BadRequest):
            parse(f"https://host/dir/{name}")

    @pytest.mark.parametrize("name", ["%2e%2e/x", "..%2Fx"])
    def test_file_urls_are_decoded_before_the_check(self, name: str) -> None:
        with pytest.raises(BadRequest):
            parse("file:///data", name)

    @pytest.mark.parametrize("source", ["hf://org/name/../../x", "org/name/../x", "hf://../x", "hf://org/..", "a--b/c"])
    def test_hub(self, source: str) -> None:
        with pytest.raises(BadRequest):
            parse(source)

    @pytest.mark.parametrize("source", ["", "a\0b", Path("a\0b")])
    def test_empty_or_with_a_nul_byte(self, source: SourceLike) -> None:
        with pytest.raises(BadRequest):
            parse(source)
        with pytest.raises(BadRequest):
            parse("org/name", "a\0b")

    @pytest.mark.parametrize("path", ["a", "a/b", "...", "..a/b..", "a b", "~", "%2e%2e/x", "日本"])
    def test_safe_paths(self, path: str) -> None:
        assert safe_path(path) == path

    def test_safe_paths_are_in_normal_form(self) -> None:
        assert safe_path("./a//b/./c") == "a/b/c"
        for path in ("", ".", "./"):
            with pytest.raises(BadRequest):
                safe_path(path)


class TestInvalid:
    @pytest.mark.parametrize(
        "source",
        [
            "https://host",
            "https://host/",
            "https://host/dir/",
            "https:///m",
            "file://host/m",
            "a b/c",
            "a/b@",
            "-a/b",
            "@v1",
        ],
    )
    def test_text(self, source: str) -> None:
        with pytest.raises(BadRequest) as raised:
            parse(source)
        assert raised.value.subject

    @pytest.mark.parametrize("source", ["/data/m", "https://host/m", "hf://org/name@v2"])
    def test_a_revision_of_a_source_without_revisions(self, source: str) -> None:
        with pytest.raises(BadRequest, match="revision"):
            parse(source, revision="v1")
        assert parse("hf://org/name@v1", revision="v1").revision == "v1"


class TestSecrets:
    SIGNED = "https://user:pa55@host/m.ckpt?X-Amz-Signature=s1gn&X-Amz-Credential=cr3d&Expires=9&token=t0k&id=7"

    def test_identity(self) -> None:
        assert parse(self.SIGNED).identity == "https://host?id=7"
        assert parse("s3://key:secr3t@bucket/m").identity == "s3://bucket/m"
        assert parse("s3://key:se@cr3t@bucket/m").identity == "s3://bucket/m"
        assert parse("hf://datasets/org/name@v1/x").identity == "hf://datasets/org/name"
        assert parse("hf://org/name@v1").identity == parse("org/name").identity == "hf://org/name"

    def test_no_text_contains_a_secret(self) -> None:
        for text in (
            str(SourceRequest.of(self.SIGNED)),
            str(parse(self.SIGNED)),
            str(SourceRequest.of("https://h", "m?sig=s1gn&token=t0k")),
        ):
            assert not any(secret in text for secret in ("pa55", "s1gn", "cr3d", "t0k")), text

    def test_the_query_is_not_in_the_repr(self) -> None:
        assert "s1gn" not in repr(parse(self.SIGNED))

    def test_equal_identities_are_one_cache_folder(self) -> None:
        # The folder name in the cache is a hash of the identity, so the identity must never change.
        digest = hashlib.sha256(parse("https://host/a/m.ckpt").identity.encode()).hexdigest()
        assert digest == hashlib.sha256(b"https://host/a").hexdigest()


def test_the_revision_is_shown() -> None:
    assert str(parse("hf://gpt2@main/config.json")) == "hf://gpt2@main/config.json"
    assert str(parse("org/name", revision="v1")) == "hf://org/name@v1"
    assert str(SourceRequest.of("org/name", "m.ckpt", revision="v1")) == "org/name@v1/m.ckpt"


def test_patterns() -> None:
    assert SourceRequest.of("a/b", allow="*.bin", ignore=["x", "y"]) == SourceRequest(
        "a/b", allow=("*.bin",), ignore=("x", "y")
    )
