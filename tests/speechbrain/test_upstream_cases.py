"""The cases of SpeechBrain's own tests of Pretrainer, fetching and the main process, on our Pretrainer.

SpeechBrain's source distribution has no tests, so they are written here, with SpeechBrain's objects as arguments. Not
on ours: `link_with_strategy`, `guess_source` and `fetch` are functions of SpeechBrain; here `collect_files` does what
they do. A URL without a folder for links is an error in SpeechBrain; here the cache has a place for it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import close_session
from speechbrain.utils import fetching, parameter_transfer

import weightferry
from tests.contract.backends import use_server
from tests.speechbrain.test_recipes import saved
from weightferry.sources import SourceRequest, parse_source
from weightferry.testing.hub import HubServer


class Content:
    """A loadable that keeps the bytes of its file."""

    read = b""

    def load(self, path: Path) -> None:
        self.read = Path(path).read_bytes()


class Bench:
    def __init__(self, root: Path) -> None:
        self.source, self.into, self.cache = root / "source", root / "into", root / "cache"
        self.source.mkdir()
        self.file, self.link = self.source / "one.ckpt", self.into / "one.ckpt"
        self.file.write_text("content")

    def collect(self, *arguments: Any, into: Path | None = None, **options: Any) -> Path:
        pretrainer = weightferry.Pretrainer(into or self.into, {"one": Content()}, cache_dir=self.cache)
        return pretrainer.collect_files(*arguments, **options)["one"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


def test_a_model_gets_the_values_of_another(tmp_path: Path) -> None:
    first, second = torch.nn.Linear(32, 32), torch.nn.Linear(32, 32)
    (tmp_path / "original").mkdir()
    (tmp_path / "original/model.ckpt").write_bytes(saved(first.state_dict()))
    assert not torch.equal(first.weight, second.weight)
    pretrainer = weightferry.Pretrainer(collect_in=tmp_path / "reused", loadables={"model": second})
    pretrainer.collect_files(default_source=tmp_path / "original")
    pretrainer.load_collected()
    assert torch.equal(first.weight, second.weight)


class TestLinkWithStrategy:
    def test_a_copy_then_a_link_then_neither(self, bench: Bench) -> None:
        source = str(bench.source)
        assert bench.collect(source, fetching.LocalStrategy.COPY) == bench.link
        assert not bench.link.is_symlink()
        assert bench.link.read_text() == "content"
        bench.link.unlink()
        assert bench.collect(source, fetching.LocalStrategy.SYMLINK) == bench.link
        assert bench.link.is_symlink()
        assert bench.link.resolve() == bench.file.resolve()
        assert bench.collect(source, fetching.LocalStrategy.NO_LINK) == bench.file

    def test_a_link_to_itself(self, bench: Bench) -> None:
        bench.file.unlink()
        bench.file.symlink_to(bench.file)
        with pytest.raises(weightferry.CollectError, match=r"one\.ckpt"):
            bench.collect(str(bench.source), fetching.LocalStrategy.SYMLINK, into=bench.source)


class TestGuessSource:
    @pytest.mark.parametrize(
        "source", ["./", "http://example.com/x", "https://example.com/x", "facebook/wav2vec2-base-960h"]
    )
    def test_the_same_guess(self, source: str, bench: Bench) -> None:
        kinds = {"file": "LOCAL", "http": "URI", "https": "URI", "hf": "HUGGING_FACE"}
        for text in (source, str(bench.source)):
            guess, path = fetching.guess_source(text)
            assert path == text
            parsed = parse_source(SourceRequest.of(text), lambda text: Path(text).is_dir())
            assert kinds[parsed.scheme] == guess.name

    def test_a_kind_is_not_guessed(self, bench: Bench) -> None:
        for kind in fetching.FetchFrom:
            source = fetching.FetchSource(kind, "org/name")
            assert fetching.guess_source(source) is source
            assert SourceRequest.of(source).kind is weightferry.FetchFrom[kind.name]


class TestFetch:
    def test_a_local_file_is_copied(self, bench: Bench) -> None:
        found = bench.collect(str(bench.source), local_strategy=fetching.LocalStrategy.COPY)
        assert found.parent == bench.into
        assert found.read_text() == "content"
        assert not found.is_symlink()

    def test_a_url_without_a_folder_goes_into_the_cache(self, bench: Bench, hub: HubServer) -> None:
        pretrainer = weightferry.Pretrainer(None, {"one": Content()}, cache_dir=bench.cache)
        path = pretrainer.collect_files(f"{hub.url}/org/model/resolve/main")["one"]
        assert path.is_relative_to(bench.cache)
        assert path.read_bytes() == ONE

    def test_no_network_is_a_value_error(self, bench: Bench) -> None:
        config = fetching.FetchConfig(allow_network=False)
        with pytest.raises(ValueError, match="allow_network"):
            bench.collect("http://example.com", fetch_config=config)
        assert not list(bench.into.glob("*"))


ONE = b"one" * 1000
NEW = b"new" * 1000


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    with HubServer() as server:
        server.add_repo("org/model", {"one.ckpt": ONE})
        server.add_tag("org/model", "first")
        use_server(server, monkeypatch)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "huggingface"))
        yield server
        close_session()


Strategy, Config = fetching.LocalStrategy, fetching.FetchConfig
CONFIGS = {
    "default": Config(),
    "overwrite": Config(overwrite=True),
    "allow_updates": Config(allow_updates=True),
    "revision": Config(revision="first", allow_updates=True),
}


def outcome(kind: Any, into: Path, strategy: Any, config: Any) -> tuple[bytes, str, str, list[str]]:
    """Collect and load; the loaded bytes, what is in the folder, where the path points, and `is_local`."""
    pretrainer = kind(into, {"one": Content()}, custom_hooks={"one": Content.load})
    path = Path(pretrainer.collect_files("org/model", strategy, config)["one"])
    pretrainer.load_collected()
    link = into / "one.ckpt"
    what = "link" if link.is_symlink() else "file" if link.exists() else "nothing"
    return pretrainer.loadables["one"].read, what, "folder" if path == link else "elsewhere", pretrainer.is_local


# SpeechBrain passes an argument that huggingface_hub ignores.
@pytest.mark.filterwarnings("ignore:The `local_dir_use_symlinks` argument is deprecated")
@pytest.mark.parametrize("existing", [b"", b"existing"], ids=["nothing", "existing"])
@pytest.mark.parametrize("config", list(CONFIGS.values()), ids=list(CONFIGS))
class TestBesideSpeechBrain:
    """What each strategy and configuration does with a model of the Hub that has changed since the tag `first`."""

    @pytest.fixture(autouse=True)
    def change(self, hub: HubServer) -> None:
        hub.add_repo("org/model", {"one.ckpt": NEW})

    @pytest.mark.parametrize("strategy", [Strategy.SYMLINK, Strategy.COPY, Strategy.COPY_SKIP_CACHE])
    def test_the_same_files(self, tmp_path: Path, strategy: Any, config: Any, existing: bytes) -> None:
        outcomes = []
        for kind in (parameter_transfer.Pretrainer, weightferry.Pretrainer):
            into = tmp_path / kind.__module__
            into.mkdir()
            if existing:
                (into / "one.ckpt").write_bytes(existing)
            outcomes.append(outcome(kind, into, strategy, config))
        assert outcomes[0] == outcomes[1]
        content = ONE if config.revision else NEW
        if existing and not config.overwrite and not config.allow_updates:
            content = existing
        assert outcomes[1][0] == content

    def test_without_links(self, tmp_path: Path, config: Any, existing: bytes) -> None:
        # With this strategy, SpeechBrain returns the path in the folder, although it makes no file there.
        if existing:
            (tmp_path / "one.ckpt").write_bytes(existing)
        what = "file" if existing else "nothing"
        content = ONE if config.revision else NEW
        expected = (content, what, "elsewhere", ["one"])
        if existing and not config.overwrite and not config.allow_updates:
            expected = (existing, what, "folder", ["one"])
        assert outcome(weightferry.Pretrainer, tmp_path, Strategy.NO_LINK, config) == expected
