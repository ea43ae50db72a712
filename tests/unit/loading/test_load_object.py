from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weightferry.errors import IntegrityError, LoadError, NoHook
from weightferry.loading.hook_registry import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_TRANSFER_HOOKS,
    mark_as_loader,
    mark_as_transfer,
    register_checkpoint_hooks,
)
from weightferry.loading.load_object import check_loadable, load_object


@pytest.fixture(autouse=True)
def _restored_registries() -> Iterator[None]:
    before = dict(DEFAULT_LOAD_HOOKS), dict(DEFAULT_TRANSFER_HOOKS)
    yield
    for hooks, content in zip((DEFAULT_LOAD_HOOKS, DEFAULT_TRANSFER_HOOKS), before, strict=True):
        hooks.clear()
        hooks.update(content)


class Thing:
    """Records the hooks that loaded it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []


def transfer(obj: Thing, path: Any) -> None:
    obj.calls.append(("transfer", path))


def load(obj: Thing, path: Any, end_of_epoch: bool) -> None:
    obj.calls.append(("load", path, end_of_epoch))


def custom(obj: Thing, path: Any) -> None:
    obj.calls.append(("custom", path))


def test_custom_wins_over_transfer_over_load() -> None:
    thing, path = Thing(), Path("somewhere")
    DEFAULT_LOAD_HOOKS[Thing] = load
    load_object("thing", thing, path)
    DEFAULT_TRANSFER_HOOKS[Thing] = transfer
    load_object("thing", thing, path)
    load_object("thing", thing, path, custom)
    assert thing.calls == [("load", path, False), ("transfer", path), ("custom", path)]


def test_the_transfer_hook_of_a_base_wins_over_the_load_hook_of_the_class() -> None:
    class Leaf(Thing):
        pass

    thing = Leaf()
    DEFAULT_LOAD_HOOKS[Leaf] = load
    DEFAULT_TRANSFER_HOOKS[Thing] = transfer
    load_object("thing", thing, "somewhere")
    assert thing.calls == [("transfer", "somewhere")]


@pytest.mark.parametrize("act", [check_loadable, lambda name, obj: load_object(name, obj, "somewhere")])
def test_no_hook_for_the_type(act: Any) -> None:
    with pytest.raises(NoHook) as caught:
        act("thing", Thing())
    text = str(caught.value)
    assert f"{Thing.__module__}.Thing" in text
    assert "'thing'" in text
    for way in ("custom_hooks={'thing': hook}", "@register_checkpoint_hooks", "DEFAULT_TRANSFER_HOOKS[Thing]"):
        assert way in text
    assert isinstance(caught.value, RuntimeError), "SpeechBrain raises a RuntimeError"


def test_a_custom_hook_that_cannot_be_called() -> None:
    with pytest.raises(NoHook, match="'thing' is a str"):
        check_loadable("thing", Thing(), "hook")  # type: ignore[arg-type]


def test_checking_loads_nothing() -> None:
    thing = Thing()
    DEFAULT_TRANSFER_HOOKS[Thing] = transfer
    check_loadable("thing", thing)
    check_loadable("thing", thing, custom)
    check_loadable("module", nn.Linear(1, 1))
    assert thing.calls == []


def test_an_error_of_a_hook_is_named_and_chained() -> None:
    def hook(obj: Thing, path: Any) -> None:
        raise ZeroDivisionError("by nought")

    with pytest.raises(LoadError, match=r"loading 'thing' from some/where failed: ZeroDivisionError: by nought") as got:
        load_object("thing", Thing(), "some/where", hook)
    assert isinstance(got.value.__cause__, ZeroDivisionError)
    assert got.value.subject == "some/where"


def test_a_collect_error_of_a_hook_is_raised_unchanged() -> None:
    def hook(obj: Thing, path: Any) -> None:
        raise IntegrityError("as it was")

    with pytest.raises(IntegrityError, match=r"^as it was$"):
        load_object("thing", Thing(), "somewhere", hook)


def test_interrupts_pass() -> None:
    def hook(obj: Thing, path: Any) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_object("thing", Thing(), "somewhere", hook)


def test_a_class_in_speechbrains_style(tmp_path: Path) -> None:
    """The example of SpeechBrain's `register_checkpoint_hooks`, with a transfer hook in addition to the loader."""

    @register_checkpoint_hooks
    class CustomRecoverable:
        def __init__(self, param: float) -> None:
            self.param = int(param)

        @mark_as_loader
        def load(self, path: Path, end_of_epoch: bool) -> None:
            raise AssertionError("the transfer hook comes first")

        @mark_as_transfer
        def transfer(self, path: Path) -> None:
            self.param = int(Path(path).read_text())

    (tmp_path / "it.ckpt").write_text("7")
    recoverable = CustomRecoverable(1)
    load_object("it", recoverable, tmp_path / "it.ckpt")
    assert recoverable.param == 7


def test_a_module_that_loads_itself_does_so_inside_of_a_wrapper(tmp_path: Path) -> None:
    class Normalizer(nn.Module):
        mean = 0.0

        @mark_as_transfer
        def read(self, path: Path) -> None:
            self.mean = json.loads(Path(path).read_text())["mean"]

    (tmp_path / "it.ckpt").write_text('{"mean": 2.5}')
    inner = Normalizer()
    load_object("it", nn.DataParallel(inner), tmp_path / "it.ckpt")
    assert inner.mean == 2.5


def test_a_hook_for_the_wrapper_itself_gets_the_wrapper() -> None:
    got = []
    DEFAULT_TRANSFER_HOOKS[nn.DataParallel] = lambda obj, path: got.append(obj)
    wrapper = nn.DataParallel(nn.Linear(1, 1))
    load_object("it", wrapper, "somewhere")
    load_object("it", wrapper, "somewhere", lambda obj, path: got.append(obj))
    assert got == [wrapper, wrapper]


@pytest.mark.parametrize("saved", [nn.Linear(2, 2).state_dict(), {}, {"state_dict": {}}])
def test_a_file_of_another_kind_of_object(saved: Any, tmp_path: Path) -> None:
    """The load_state_dict of a scheduler would store any mapping as its attributes."""
    path = tmp_path / "it.ckpt"
    torch.save(saved, path)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    for obj in (optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1), torch.amp.GradScaler("cpu")):
        before = dict(vars(obj))
        with pytest.raises(LoadError, match=r"it\.ckpt holds no state of"):
            load_object("it", obj, path)
        assert vars(obj) == before


def test_an_optimizer_of_another_size(tmp_path: Path) -> None:
    path = tmp_path / "it.ckpt"
    torch.save(torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0).state_dict(), path)
    two = torch.optim.SGD([nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))], lr=2.0)
    with pytest.raises(LoadError, match=r"it\.ckpt: SGD rejects the state in this file \(ValueError: .*keys are"):
        load_object("it", two, path)
    assert two.param_groups[0]["lr"] == 2.0


def test_cyclic_lr_with_speechbrains_marker(tmp_path: Path) -> None:
    def make() -> torch.optim.lr_scheduler.CyclicLR:
        optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)
        return torch.optim.lr_scheduler.CyclicLR(optimizer, 0.1, 1.0, cycle_momentum=False)

    saved = make()
    saved.optimizer.step()
    saved.step()
    state = saved.state_dict() | {"_scale_fn_ref": "WEAKREF"}
    del state["_scale_fn_custom"]
    torch.save(state, tmp_path / "it.ckpt")
    loaded = make()
    load_object("it", loaded, tmp_path / "it.ckpt")
    assert loaded.last_epoch == 1
    assert loaded.get_last_lr() == saved.get_last_lr()
    assert loaded.scale_fn(1.0) == 1.0
