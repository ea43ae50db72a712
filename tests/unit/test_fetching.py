"""The local strategy and the fetch configuration: what they accept, and what Pretrainer does with them."""

from __future__ import annotations

import enum
import os
import pickle
from collections import namedtuple
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from weightferry import BadRequest, FetchConfig, FetchFrom, FetchSource, LocalStrategy, Pretrainer, SourceNotFound
from weightferry.collection import CollectArguments
from weightferry.errors import CollectError
from weightferry.origins.access import OriginAccess
from weightferry.sources import SourceRequest, parse_source


# As speechbrain.utils.fetching defines them.
class Theirs:
    FetchFrom = enum.Enum("FetchFrom", {"LOCAL": 1, "HUGGING_FACE": 2, "URI": 3})
    FetchSource = namedtuple("FetchSource", ["FetchFrom", "path"])  # noqa: PYI024
    LocalStrategy = enum.Enum("LocalStrategy", {"SYMLINK": 1, "COPY": 2, "COPY_SKIP_CACHE": 3, "NO_LINK": 4})

    @dataclass(frozen=True)
    class FetchConfig:
        overwrite: bool = False
        allow_updates: bool = False
        allow_network: bool = True
        token: bool = False
        revision: Any = None
        huggingface_cache_dir: Any = None


class TestTheirObjects:
    @pytest.mark.parametrize("kind", list(Theirs.FetchFrom), ids=lambda kind: kind.name)
    def test_a_fetch_source(self, kind: Any) -> None:
        source = Theirs.FetchSource(kind, "org/name")
        assert FetchSource.of(source) == FetchSource(FetchFrom[kind.name], "org/name")
        assert SourceRequest.of(source).kind is FetchFrom[kind.name]  # type: ignore[arg-type]
        path = Theirs.FetchSource(kind, "org/name/x.ckpt")
        assert Pretrainer.split_path(path) == (FetchSource(FetchFrom[kind.name], "org/name"), "x.ckpt")  # type: ignore[call-overload]

    def test_ours_is_itself(self) -> None:
        source = FetchSource(FetchFrom.LOCAL, "org/name")
        assert FetchSource.of(source) is source
        for other in ("org/name", Path("org/name"), ("org", "name"), None):
            assert FetchSource.of(other) is None

    @pytest.mark.parametrize("kind", [1, "LOCAL", Theirs.LocalStrategy.COPY, None])
    def test_a_source_of_an_unknown_kind(self, kind: Any) -> None:
        for source in (Theirs.FetchSource(kind, "org/name"), FetchSource(kind, "org/name")):
            with pytest.raises(BadRequest, match=r"must be FetchFrom\.LOCAL, FetchFrom\.HUGGING_FACE, FetchFrom\.URI"):
                FetchSource.of(source)

    @pytest.mark.parametrize("name", list(LocalStrategy.__members__))
    def test_a_local_strategy(self, name: str) -> None:
        assert LocalStrategy.of(Theirs.LocalStrategy[name]) is LocalStrategy[name]
        assert LocalStrategy.of(LocalStrategy[name]) is LocalStrategy[name]

    @pytest.mark.parametrize("given", ["COPY", None, 2, True, LocalStrategy, Theirs.FetchFrom.LOCAL])
    def test_no_local_strategy(self, given: Any) -> None:
        with pytest.raises(BadRequest, match=r"local_strategy must be LocalStrategy\.SYMLINK, .*NO_LINK, from"):
            LocalStrategy.of(given)

    def test_a_fetch_config(self) -> None:
        theirs = Theirs.FetchConfig(allow_updates=True, token=True, revision="v1")
        assert FetchConfig.of(theirs) == FetchConfig(allow_updates=True, token=True, revision="v1")
        assert FetchConfig.of(Theirs.FetchConfig()) == FetchConfig()
        assert FetchConfig.of(None) is None

    @pytest.mark.parametrize("given", [{}, "v1", True, FetchConfig, SimpleNamespace(overwrite=True)])
    def test_no_fetch_config(self, given: Any) -> None:
        with pytest.raises(BadRequest, match="fetch_config must be None or a FetchConfig"):
            FetchConfig.of(given)

    @pytest.mark.parametrize(
        ("values", "said"),
        [
            ({"overwrite": 1}, "overwrite of FetchConfig must be bool, not int"),
            ({"allow_updates": None}, "allow_updates of FetchConfig must be bool, not NoneType"),
            ({"allow_network": "no"}, "allow_network of FetchConfig must be bool, not str"),
            ({"token": 5}, "token of FetchConfig must be bool or str or None, not int"),
            ({"token": ""}, "token of FetchConfig must be bool or str or None, not an empty text"),
            ({"revision": b"main"}, "revision of FetchConfig must be str or None, not bytes"),
            ({"revision": ""}, "revision of FetchConfig must be str or None, not an empty text"),
            ({"huggingface_cache_dir": 1}, "huggingface_cache_dir of FetchConfig must be str or Path or None, not int"),
        ],
    )
    def test_a_value_of_a_wrong_type(self, values: dict[str, Any], said: str) -> None:
        for make in (FetchConfig, lambda **values: FetchConfig.of(Theirs.FetchConfig(**values))):
            with pytest.raises(BadRequest, match=said):
                make(**values)

    def test_a_token_is_not_shown(self) -> None:
        assert "secret" not in repr(FetchConfig(token="secret"))
        assert "secret" not in repr(OriginAccess(token="secret"))


class TestArguments:
    CONFIG = FetchConfig(revision="v1")

    @pytest.mark.parametrize(
        ("given", "strategy", "config"),
        [
            ((True, LocalStrategy.SYMLINK, None), LocalStrategy.SYMLINK, None),
            ((False, LocalStrategy.COPY, CONFIG), LocalStrategy.COPY, CONFIG),
            # SpeechBrain 1.1: the local strategy comes second.
            ((LocalStrategy.COPY, LocalStrategy.SYMLINK, None), LocalStrategy.COPY, None),
            ((LocalStrategy.COPY, LocalStrategy.SYMLINK, CONFIG), LocalStrategy.COPY, CONFIG),
            ((LocalStrategy.COPY, CONFIG, None), LocalStrategy.COPY, CONFIG),
            ((Theirs.LocalStrategy.NO_LINK, Theirs.FetchConfig(revision="v1"), None), LocalStrategy.NO_LINK, CONFIG),
        ],
    )
    def test_both_orders(self, given: Any, strategy: LocalStrategy, config: FetchConfig | None) -> None:
        assert CollectArguments.of("org/name", *given) == CollectArguments("org/name", strategy, config)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ((1, LocalStrategy.COPY, None), r"second argument of collect_files must be True or False .* it is 1"),
            ((None, LocalStrategy.COPY, None), "it is None"),
            ((CONFIG, LocalStrategy.COPY, None), "second argument"),
            ((LocalStrategy.COPY, CONFIG, CONFIG), "two values for fetch_config"),
            ((True, CONFIG, None), "local_strategy must be"),
        ],
    )
    def test_neither_order(self, given: Any, said: str) -> None:
        with pytest.raises(BadRequest, match=said):
            CollectArguments.of("org/name", *given)

    def test_a_token_stays_on_its_rank(self) -> None:
        arguments = CollectArguments("org/name", fetch_config=FetchConfig(token="hf_secret", revision="v1"))
        assert arguments.for_other_ranks().fetch_config == FetchConfig(token=None, revision="v1")
        assert b"hf_secret" not in pickle.dumps(arguments.for_other_ranks())
        for token in (True, False, None):
            same = CollectArguments("org/name", fetch_config=FetchConfig(token=token))
            assert same.for_other_ranks() == same


@pytest.mark.parametrize("source", ["/local", "https://host/folder", "s3://bucket/folder"])
def test_only_the_hub_has_revisions(source: str) -> None:
    request = SourceRequest.of(source, "x.ckpt", revision="v1", revision_of_hub=True)
    assert parse_source(request, lambda _: False).revision is None
    hub = SourceRequest.of("org/name", "x.ckpt", revision="v1", revision_of_hub=True)
    assert parse_source(hub, lambda _: False).revision == "v1"
    assert parse_source(hub, lambda _: True).revision is None, "a local folder of that name"


class Bench:
    """One file from a local source, collected as the test says."""

    def __init__(self, root: Path) -> None:
        self.file, self.into, self.cache = root / "source/x.ckpt", root / "into", root / "cache"
        self.file.parent.mkdir()
        self.file.write_bytes(b"content")
        self.link = self.into / "x.ckpt"

    def collect(self, *arguments: Any, collect_in: Path | None = None, **options: Any) -> Path:
        pretrainer = Pretrainer(collect_in or self.into, {"x": object()}, cache_dir=self.cache)
        return pretrainer.collect_files(self.file.parent, *arguments, **options)["x"]


@pytest.fixture
def bench(tmp_path: Path) -> Bench:
    return Bench(tmp_path)


class TestStrategies:
    def test_symlink(self, bench: Bench) -> None:
        assert bench.collect(LocalStrategy.SYMLINK) == bench.link
        assert os.readlink(bench.link) == str(bench.file)

    @pytest.mark.parametrize("strategy", [LocalStrategy.COPY, LocalStrategy.COPY_SKIP_CACHE])
    def test_copy(self, bench: Bench, strategy: LocalStrategy) -> None:
        bench.collect()
        assert bench.link.is_symlink()
        assert bench.collect(strategy) == bench.link
        assert not bench.link.is_symlink()
        bench.file.write_bytes(b"changed")
        assert bench.link.read_bytes() == b"content"
        inode = bench.link.stat().st_ino
        assert bench.collect(strategy).read_bytes() == b"changed"
        assert bench.link.stat().st_ino != inode, "the new file took the place of the old one at once"
        assert [path.name for path in bench.into.iterdir()] == ["x.ckpt"]

    def test_an_equal_file_is_not_copied_again(self, bench: Bench) -> None:
        before = bench.collect(LocalStrategy.COPY).stat()
        assert bench.collect(LocalStrategy.COPY).stat() == before
        assert bench.collect(LocalStrategy.SYMLINK).stat() == before

    def test_a_copy_has_the_permissions_of_the_umask(self, bench: Bench) -> None:
        bench.file.chmod(0o400)
        before = os.umask(0o027)
        try:
            assert bench.collect(LocalStrategy.COPY).stat().st_mode & 0o777 == 0o640
        finally:
            os.umask(before)

    def test_no_link(self, bench: Bench) -> None:
        assert bench.collect(LocalStrategy.NO_LINK) == bench.file
        assert not bench.into.exists()

    def test_the_source_itself(self, bench: Bench) -> None:
        for strategy in LocalStrategy:
            assert bench.collect(strategy, collect_in=bench.file.parent) == bench.file
            assert not bench.file.is_symlink()
            assert bench.file.read_bytes() == b"content"

    @pytest.mark.parametrize("strategy", list(LocalStrategy))
    def test_a_link_to_itself(self, bench: Bench, strategy: LocalStrategy) -> None:
        bench.file.unlink()
        bench.file.symlink_to(bench.file)
        with pytest.raises(CollectError, match=r"x\.ckpt"):
            bench.collect(strategy, collect_in=bench.file.parent)

    def test_a_folder_in_the_way(self, bench: Bench) -> None:
        bench.link.mkdir(parents=True)
        with pytest.raises(BadRequest, match="a folder is in the way"):
            bench.collect(LocalStrategy.COPY)
        assert bench.link.is_dir()

    def test_a_folder_cannot_be_copied(self, bench: Bench) -> None:
        pretrainer = Pretrainer(bench.into, {"x": object()}, {"x": f"{bench.file.parent}/"}, cache_dir=bench.cache)
        with pytest.raises(BadRequest, match="is a folder, and local_strategy COPY copies single files only"):
            pretrainer.collect_files(local_strategy=LocalStrategy.COPY)
        index = {"x": f"{bench.file.parent}/model.safetensors.index.json"}
        with pytest.raises(BadRequest, match="'x' is an index of shards"):
            Pretrainer(bench.into, {"x": object()}, index, cache_dir=bench.cache).collect_files(
                local_strategy=LocalStrategy.COPY
            )


class TestExistingFiles:
    """The source has other content than the file in `collect_in`."""

    @pytest.fixture(autouse=True)
    def existing(self, bench: Bench) -> None:
        bench.into.mkdir()
        bench.link.write_bytes(b"existing")

    @pytest.mark.parametrize("strategy", list(LocalStrategy))
    def test_is_used_as_it_is(self, bench: Bench, strategy: LocalStrategy) -> None:
        assert bench.collect(strategy, FetchConfig()) == bench.link
        assert bench.link.read_bytes() == b"existing"
        # Of a source that is not on the Hub there are no updates.
        assert bench.collect(strategy, FetchConfig(allow_updates=True)).read_bytes() == b"existing"

    @pytest.mark.parametrize("config", [None, FetchConfig(overwrite=True)])
    def test_is_replaced(self, bench: Bench, config: FetchConfig | None) -> None:
        assert bench.collect(fetch_config=config).read_bytes() == b"content"
        assert bench.link.is_symlink()

    def test_no_source_is_needed(self, bench: Bench) -> None:
        bench.file.unlink()
        assert bench.collect(fetch_config=FetchConfig()).read_bytes() == b"existing"
        with pytest.raises(SourceNotFound):
            bench.collect()

    def test_a_broken_link_is_replaced(self, bench: Bench) -> None:
        bench.link.unlink()
        bench.link.symlink_to(bench.file.with_name("gone"))
        assert bench.collect(fetch_config=FetchConfig()).read_bytes() == b"content"

    def test_a_folder_is_not_used(self, bench: Bench) -> None:
        bench.link.unlink()
        bench.link.mkdir()
        with pytest.raises(BadRequest, match="a folder is in the way"):
            bench.collect(fetch_config=FetchConfig())

    def test_one_of_two_exists(self, bench: Bench) -> None:
        bench.file.with_name("y.ckpt").write_bytes(b"y")
        pretrainer = Pretrainer(bench.into, {"x": object(), "y": object()}, cache_dir=bench.cache)
        found = pretrainer.collect_files(bench.file.parent, fetch_config=FetchConfig())
        assert {name: path.read_bytes() for name, path in found.items()} == {"x": b"existing", "y": b"y"}
        assert list(found) == ["x", "y"]
