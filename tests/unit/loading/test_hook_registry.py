from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weightferry.loading import hook_registry as registry
from weightferry.loading.hook_registry import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_TRANSFER_HOOKS,
    find_hook,
    get_default_hook,
    mark_as_loader,
    mark_as_transfer,
    register_checkpoint_hooks,
)
from weightferry.loading.hooks import load_cyclic_lr, load_module, load_sentencepiece, load_state, transfer_module


@pytest.fixture(autouse=True)
def _restored_registries(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Restore the registries after each test; the dicts stay the same objects."""
    before = dict(DEFAULT_LOAD_HOOKS), dict(DEFAULT_TRANSFER_HOOKS)
    yield
    for hooks, content in zip((DEFAULT_LOAD_HOOKS, DEFAULT_TRANSFER_HOOKS), before, strict=True):
        hooks.clear()
        hooks.update(content)


def test_the_extension_is_that_of_speechbrain() -> None:
    assert registry.PARAMFILE_EXT == ".ckpt"


def adam() -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=1.0)


@pytest.mark.parametrize(
    ("make", "hook"),
    [
        (lambda: nn.Linear(1, 1), load_module),
        (adam, load_state),
        (lambda: torch.optim.lr_scheduler.StepLR(adam(), 1), load_state),
        (lambda: torch.optim.lr_scheduler.ReduceLROnPlateau(adam()), load_state),
        (lambda: torch.optim.lr_scheduler.CyclicLR(adam(), 0.1, 1.0, cycle_momentum=False), load_cyclic_lr),
        (lambda: torch.amp.GradScaler("cpu"), load_state),
        (object, None),
    ],
)
def test_load_hooks(make: Any, hook: Any) -> None:
    assert get_default_hook(make(), DEFAULT_LOAD_HOOKS) is hook


def test_transfer_hooks() -> None:
    processor = pytest.importorskip("sentencepiece").SentencePieceProcessor()
    assert get_default_hook(nn.Linear(1, 1), DEFAULT_TRANSFER_HOOKS) is transfer_module
    assert get_default_hook(processor, DEFAULT_TRANSFER_HOOKS) is load_sentencepiece
    assert get_default_hook(adam(), DEFAULT_TRANSFER_HOOKS) is None


def test_the_nearest_class_wins() -> None:
    class Base:
        pass

    class Middle(Base):
        pass

    class Leaf(Middle):
        pass

    def of_base() -> None: ...
    def of_middle() -> None: ...

    hooks: dict[type, Any] = {Base: of_base, Middle: of_middle}
    assert get_default_hook(Leaf(), hooks) is of_middle
    assert get_default_hook(Base(), hooks) is of_base


def test_methods_are_registered_by_mark() -> None:
    @register_checkpoint_hooks
    class Marked:
        @mark_as_loader
        def load(self, path: Path, end_of_epoch: bool) -> None: ...

        @mark_as_transfer
        def transfer(self, path: Path) -> None: ...

    assert DEFAULT_LOAD_HOOKS[Marked] is Marked.load
    assert DEFAULT_TRANSFER_HOOKS[Marked] is Marked.transfer


def test_one_mark_registers_one_hook() -> None:
    @register_checkpoint_hooks
    class Marked:
        @mark_as_loader
        def load(self, path: Path, end_of_epoch: bool = False) -> None: ...

    assert Marked in DEFAULT_LOAD_HOOKS
    assert Marked not in DEFAULT_TRANSFER_HOOKS


def test_the_keyword_of_speechbrain_is_accepted() -> None:
    class Plain:
        pass

    assert register_checkpoint_hooks(Plain, save_on_main_only=False) is Plain
    assert list(inspect.signature(register_checkpoint_hooks).parameters) == ["cls", "save_on_main_only"]


def test_the_marks_of_speechbrain_are_accepted() -> None:
    class Marked(nn.Module):
        def load(self, path: Path, end_of_epoch: bool) -> None: ...
        def transfer(self, path: Path) -> None: ...

        load._speechbrain_loader = True  # type: ignore[attr-defined]
        transfer._speechbrain_transfer = True  # type: ignore[attr-defined]

    assert find_hook(Marked(), DEFAULT_TRANSFER_HOOKS, registry.TRANSFER_MARK) is Marked.transfer
    assert find_hook(Marked(), DEFAULT_LOAD_HOOKS, registry.LOADER_MARK) is Marked.load


def test_an_entry_of_a_class_wins_over_its_mark_and_a_mark_over_entries_of_its_bases() -> None:
    class Marked(nn.Module):
        @mark_as_transfer
        def transfer(self, path: Path) -> None: ...

    def other(obj: Any, path: Path) -> None: ...

    assert find_hook(Marked(), DEFAULT_TRANSFER_HOOKS, registry.TRANSFER_MARK) is Marked.transfer
    DEFAULT_TRANSFER_HOOKS[Marked] = other
    assert find_hook(Marked(), DEFAULT_TRANSFER_HOOKS, registry.TRANSFER_MARK) is other


def test_an_attribute_that_has_every_attribute_is_not_marked() -> None:
    class Everything:
        def __getattr__(self, name: str) -> str:
            return name

        def __call__(self) -> None: ...

    class Container:
        everything = Everything()

    assert find_hook(Container(), {}, registry.TRANSFER_MARK) is None


def test_signatures_are_checked() -> None:
    with pytest.raises(TypeError, match=r"loader must have the signature \(self, path, end_of_epoch\)"):
        mark_as_loader(lambda self, path: None)
    with pytest.raises(TypeError, match=r"transfer hook must have the signature \(self, path\)"):
        mark_as_transfer(lambda self: None)
    mark_as_loader(lambda self, path, end_of_epoch=False: None)
    mark_as_transfer(lambda *anything: None)
