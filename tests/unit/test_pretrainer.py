"""Pretrainer on one process: the interface and the cases of SpeechBrain, and the differences from it."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hyperpyyaml import load_hyperpyyaml

import weightferry
from weightferry import BadRequest, FetchFrom, FetchSource, NoHook, Pretrainer, SourceNotFound


class Box:
    """An object to load into, with a custom hook."""

    def __init__(self) -> None:
        self.content = b""

    @staticmethod
    def hook(box: Box, path: Path) -> None:
        box.content = Path(path).read_bytes()


class Bench:
    def __init__(self, root: Path) -> None:
        self.source, self.into, self.cache = root / "source", root / "deep" / "into", root / "cache"
        self.source.mkdir()
        for name in ("a", "b", "c"):
            (self.source / f"{name}.ckpt").write_bytes(name.encode())

    def make(self, *names: str, **options: Any) -> Pretrainer:
        given: dict[str, Any] = {"collect_in": self.into, "cache_dir": self.cache}
        given |= {"loadables": {name: Box() for name in names}, "custom_hooks": dict.fromkeys(names, Box.hook)}
        return Pretrainer(**(given | options))

    def contents(self, pretrainer: Pretrainer) -> dict[str, bytes]:
        return {name: box.content for name, box in pretrainer.loadables.items()}


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Bench:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    return Bench(tmp_path)


@pytest.mark.parametrize(
    ("path", "source", "name"),
    [
        # The results of SpeechBrain 1.0.3.
        ("org/model/m.ckpt", "org/model", "m.ckpt"),
        ("org/model/sub/m.ckpt", "org/model/sub", "m.ckpt"),
        ("https://host/a/m.ckpt", "https://host/a", "m.ckpt"),
        ("/data/m.ckpt", "/data", "m.ckpt"),
        ("./m.ckpt", ".", "m.ckpt"),
        ("m.ckpt", "./", "m.ckpt"),
        # SpeechBrain returns ("", "m.ckpt") for the first of these, and splits the second inside of its query.
        ("/m.ckpt", "/", "m.ckpt"),
        ("https://host/a/m.ckpt?sig=a/b", "https://host/a", "m.ckpt?sig=a/b"),
    ],
)
def test_split_path(path: str, source: str, name: str) -> None:
    assert Pretrainer.split_path(path) == (source, name)
    for kind in FetchFrom:
        assert Pretrainer.split_path(FetchSource(kind, path)) == (FetchSource(kind, source), name)
    if not path.startswith("https"):
        assert Pretrainer.split_path(Path(path)) == Pretrainer.split_path(str(Path(path)))


class TestCollect:
    def test_paths_and_the_default_source(self, bench: Bench) -> None:
        pretrainer = bench.make("a", "x", paths={"x": str(bench.source / "b.ckpt")})
        got = pretrainer.collect_files(default_source=str(bench.source))
        assert got == {"a": bench.into / "a.ckpt", "x": bench.into / "x.ckpt"}
        assert os.readlink(got["x"]) == str(bench.source / "b.ckpt")
        pretrainer.load_collected()
        assert bench.contents(pretrainer) == {"a": b"a", "x": b"b"}
        assert pretrainer.report is not None
        assert pretrainer.report.operation == "collect"

    def test_everything_may_be_added_later(self, bench: Bench) -> None:
        pretrainer = Pretrainer(cache_dir=bench.cache)
        assert pretrainer.collect_in is None, "as in SpeechBrain 1.1"
        pretrainer.set_collect_in(str(bench.into))
        pretrainer.add_loadables({"x": Box()})
        pretrainer.add_paths({"x": "nowhere"})
        pretrainer.add_paths({"x": FetchSource(FetchFrom.LOCAL, str(bench.source / "a.ckpt"))})
        pretrainer.add_custom_hooks({"x": Box.hook})
        pretrainer.add_conditions({"x": True})
        assert pretrainer.collect_files() == {"x": bench.into / "x.ckpt"}
        pretrainer.load_collected()
        assert bench.contents(pretrainer) == {"x": b"a"}

    def test_the_folder_may_be_below_the_working_folder(self, bench: Bench) -> None:
        assert bench.make("a", collect_in="m").collect_files(bench.source) == {"a": Path.cwd() / "m/a.ckpt"}

    def test_no_links_without_a_folder(self, bench: Bench) -> None:
        pretrainer = bench.make("a", collect_in=None)
        assert pretrainer.collect_files(bench.source) == {"a": bench.source / "a.ckpt"}
        pretrainer.load_collected()
        assert bench.contents(pretrainer) == {"a": b"a"}
        assert not bench.into.exists()

    def test_existing_files_are_replaced_only_when_they_differ(self, bench: Bench) -> None:
        bench.into.mkdir(parents=True)
        (bench.into / "a.ckpt").write_bytes(b"a")
        (bench.into / "b.ckpt").write_bytes(b"old")
        bench.make("a", "b").collect_files(bench.source)
        assert not (bench.into / "a.ckpt").is_symlink()
        assert (bench.into / "b.ckpt").is_symlink()
        assert (bench.into / "b.ckpt").read_bytes() == b"b"
        before = (bench.into / "b.ckpt").lstat().st_ino
        bench.make("a", "b").collect_files(bench.source)
        assert (bench.into / "b.ckpt").lstat().st_ino == before

    def test_a_name_may_have_a_folder(self, bench: Bench) -> None:
        pretrainer = bench.make("sub/x", paths={"sub/x": str(bench.source / "a.ckpt")})
        assert pretrainer.collect_files() == {"sub/x": bench.into / "sub/x.ckpt"}

    def test_alone_inside_of_a_job(self, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
        for name, value in {"RANK": "1", "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(weightferry.NotDistributed, match="which node has rank 0"):
            bench.make("a").collect_files(bench.source)
        pretrainer = bench.make("a")
        assert pretrainer.collect_files(bench.source, internal_ddp_handling=False) == {"a": bench.into / "a.ckpt"}
        pretrainer.load_collected()
        assert bench.contents(pretrainer) == {"a": b"a"}


class TestConditions:
    @pytest.mark.parametrize("condition", [False, 0, lambda: False, lambda: 0], ids=["value", "0", "callable", "0()"])
    def test_a_false_condition_skips_the_loadable(self, bench: Bench, condition) -> None:
        pretrainer = bench.make("a", "b", conditions={"b": condition})
        assert pretrainer.is_loadable("a")
        assert pretrainer.is_loadable("b") is False
        assert pretrainer.collect_files(bench.source).keys() == {"a"}
        pretrainer.load_collected()
        assert bench.contents(pretrainer) == {"a": b"a", "b": b""}
        assert not (bench.into / "b.ckpt").is_symlink()

    def test_a_callable_is_called_each_time(self, bench: Bench) -> None:
        answers = [True, False]
        pretrainer = bench.make("a", conditions={"a": lambda: answers.pop()})
        assert [pretrainer.is_loadable("a"), pretrainer.is_loadable("a")] == [False, True]

    def test_no_source_is_needed_for_them(self, bench: Bench) -> None:
        assert bench.make("a", "b", conditions={"a": False, "b": lambda: False}).collect_files() == {}


class TestBadRequests:
    def test_no_path_and_no_default_source(self, bench: Bench) -> None:
        with pytest.raises(ValueError, match="'a' has no path, and there is no default source") as raised:
            bench.make("a").collect_files()
        assert isinstance(raised.value, BadRequest)

    @pytest.mark.parametrize("name", ["../x", "/x", "a/../../x", "..\\x"])
    def test_a_name_that_leaves_the_folder(self, bench: Bench, name: str) -> None:
        with pytest.raises(BadRequest, match="must be a relative path"):
            bench.make(name, paths={name: str(bench.source / "a.ckpt")}).collect_files()
        assert sorted(path.name for path in bench.source.parent.rglob("*.ckpt")) == ["a.ckpt", "b.ckpt", "c.ckpt"]

    def test_two_loadables_of_one_link(self, bench: Bench) -> None:
        both = {"sub/x": str(bench.source / "a.ckpt"), "sub//x": str(bench.source / "b.ckpt")}
        with pytest.raises(BadRequest, match="share the link"):
            bench.make(*both, paths=both).collect_files()
        assert list(bench.into.parent.rglob("*.ckpt")) == []

    def test_a_missing_file_is_named(self, bench: Bench) -> None:
        with pytest.raises(SourceNotFound, match=r"bb\.ckpt.*did you mean b\.ckpt"):
            bench.make("a", "x", paths={"x": str(bench.source / "bb.ckpt")}).collect_files(bench.source)
        assert not (bench.into / "a.ckpt").is_symlink(), "all or nothing"

    def test_loading_a_file_that_was_never_collected(self, bench: Bench) -> None:
        with pytest.raises(ValueError, match="never collected"):
            bench.make("a", collect_in=None).load_collected()


class TestLoad:
    def test_without_collect_it_looks_in_the_folder(self, bench: Bench) -> None:
        pretrainer = bench.make("a", collect_in=bench.source)
        pretrainer.load_collected()
        assert bench.contents(pretrainer) == {"a": b"a"}

    def test_modules_and_custom_hooks(self, bench: Bench) -> None:
        torch.save({"weight": torch.ones(1, 1), "bias": torch.ones(1)}, bench.source / "m.ckpt")
        seen = []
        module, other = torch.nn.Linear(1, 1), torch.nn.Linear(1, 1)
        pretrainer = bench.make(
            loadables={"m": module, "n": other},
            paths={"n": str(bench.source / "m.ckpt")},
            custom_hooks={"n": lambda obj, path: seen.append((obj, path))},
        )
        pretrainer.collect_files(bench.source)
        pretrainer.load_collected()
        assert module(torch.ones(1)).item() == 2
        assert seen == [(other, bench.into / "n.ckpt")], "a custom hook wins"

    def test_no_hook_for_the_type(self, bench: Bench) -> None:
        module = torch.nn.Linear(1, 1)
        before = module.weight.detach().clone()
        torch.save({"weight": before + 1, "bias": torch.ones(1)}, bench.source / "m.ckpt")
        pretrainer = bench.make(loadables={"m": module, "a": object()})
        pretrainer.collect_files(bench.source)
        with pytest.raises(NoHook, match="object"):
            pretrainer.load_collected()
        assert torch.equal(module.weight, before), "the check runs before anything is written"


def test_hyperpyyaml(bench: Bench) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), bench.source / "model.ckpt")
    text = f"""
model: !new:torch.nn.Linear
    in_features: 2
    out_features: 2
pretrainer: !new:weightferry.Pretrainer
    collect_in: {bench.into}
    cache_dir: {bench.cache}
    loadables:
        model: !ref <model>
    paths:
        model: {bench.source}/model.ckpt
    conditions:
        model: true
"""
    pretrainer = load_hyperpyyaml(text)["pretrainer"]
    assert isinstance(pretrainer, Pretrainer)
    assert pretrainer.collect_files() == {"model": bench.into / "model.ckpt"}
    pretrainer.load_collected()


def test_repr_shows_the_state(bench: Bench) -> None:
    pretrainer = bench.make("a")
    pretrainer.collect_files(bench.source)
    assert repr(pretrainer) == f"Pretrainer(collect_in={bench.into}, loadables=['a'], collected=['a'])"


def test_names_that_differ_in_case_are_two_links(tmp_path: Path) -> None:
    for name in ("Model", "model"):
        (tmp_path / f"{name}.ckpt").write_text(name)
    pretrainer = Pretrainer(tmp_path / "links", {"Model": object(), "model": object()})
    paths = pretrainer.collect_files(tmp_path)
    assert {name: path.read_text() for name, path in paths.items()} == {"Model": "Model", "model": "model"}


def test_a_file_in_the_middle_of_a_chain(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        archive.writestr("deep/m.ckpt", "content")
    pretrainer = Pretrainer(
        None,
        {"m": object()},
        {"m": f"zip://deep/m.ckpt::file://{tmp_path}/all.zip"},
        cache_dir=tmp_path / "cache",
    )
    assert pretrainer.collect_files()["m"].read_text() == "content"


def test_load_alone_looks_in_the_home_of_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "thing.ckpt").write_text("content")
    read: list[str] = []
    hooks = {"thing": lambda _, path: read.append(path.read_text())}
    Pretrainer("~/m", {"thing": object()}, custom_hooks=hooks).load_collected()
    assert read == ["content"]
