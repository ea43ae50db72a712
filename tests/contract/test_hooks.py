"""The contract of every hook, for every type and every format."""

from __future__ import annotations

import functools
import io
import json
import pickle
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from weightferry.errors import LoadError
from weightferry.loading.hook_registry import mark_as_loader, mark_as_transfer
from weightferry.loading.hooks import load_module
from weightferry.loading.load_object import load_object

Load = Callable[[str, Any, Path], None]


@dataclass(frozen=True)
class Kind:
    """A type of object, with functions that create an object, change it, and return its state."""

    make: Callable[[], Any]
    change: Callable[[Any], None]
    state: Callable[[Any], Any] = lambda obj: obj.state_dict()
    formats: tuple[str, ...] = ("torch zip", "torch legacy")
    load: Load = load_object


class Network(nn.Module):
    """Parameters, buffers of two dtypes, and a tied pair."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(4, 7)
        self.head.weight = self.embed.weight


class Counter:
    """A user's class with a marked method."""

    def __init__(self) -> None:
        self.counts = [0, 0]

    def state_dict(self) -> dict[str, Any]:
        return {"counts": self.counts}

    @mark_as_transfer
    def read(self, path: Path) -> None:
        self.counts = json.loads(Path(path).read_text())["counts"]


class Loader(Counter):
    read = None  # type: ignore[assignment]

    @mark_as_loader
    def load(self, path: Path, end_of_epoch: bool) -> None:
        assert end_of_epoch is False
        super().read(path)


def optimizer() -> torch.optim.Optimizer:
    torch.manual_seed(0)
    return torch.optim.AdamW(nn.Linear(3, 2).parameters(), lr=1.0)


def step(obj: Any) -> None:
    target = getattr(obj, "optimizer", obj)
    for group in target.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    target.step()
    if obj is not target:
        obj.step(*([1.0] if isinstance(obj, torch.optim.lr_scheduler.ReduceLROnPlateau) else []))


def scramble(module: nn.Module) -> None:
    with torch.no_grad():
        for tensor in module.state_dict().values():
            tensor.copy_(torch.arange(tensor.numel()).reshape(tensor.shape) + 1)


def rescale(scaler: torch.amp.GradScaler) -> None:
    scaler.load_state_dict({**scaler.state_dict(), "scale": 8.0, "_growth_tracker": 3})


def sentencepiece_processor() -> Any:
    return pytest.importorskip("sentencepiece").SentencePieceProcessor()


@functools.cache
def sentencepiece_model() -> bytes:
    trainer = pytest.importorskip("sentencepiece").SentencePieceTrainer
    model = io.BytesIO()
    lines = iter(["we carry weights", "over the river to every rank"] * 9)
    options = {"vocab_size": 30, "hard_vocab_limit": False, "minloglevel": 2}
    trainer.train(sentence_iterator=lines, model_writer=model, **options)
    return model.getvalue()


def count(obj: Counter) -> None:
    obj.counts = [3, 4]


def scheduler(name: str, **options: Any) -> Callable[[], Any]:
    return lambda: getattr(torch.optim.lr_scheduler, name)(optimizer(), **options)


def strictly(name: str, obj: Any, path: Path) -> None:
    load_object(name, obj, path, custom_hook=load_module)


MODULE_FORMATS = ("torch zip", "torch legacy", "safetensors")
KINDS = {
    "module": Kind(Network, scramble, formats=MODULE_FORMATS),
    "module, strict": Kind(Network, scramble, formats=MODULE_FORMATS, load=strictly),
    "optimizer": Kind(optimizer, step),
    "StepLR": Kind(scheduler("StepLR", step_size=1), step),
    "ReduceLROnPlateau": Kind(scheduler("ReduceLROnPlateau", patience=0), step),
    "CyclicLR": Kind(scheduler("CyclicLR", base_lr=0.1, max_lr=1.0, cycle_momentum=False), step),
    "GradScaler": Kind(lambda: torch.amp.GradScaler("cpu", init_scale=2.0), rescale),
    "sentencepiece": Kind(
        sentencepiece_processor,
        lambda obj: obj.LoadFromSerializedProto(sentencepiece_model()),
        lambda obj: obj.serialized_model_proto(),
        formats=("bytes",),
    ),
    "marked transfer": Kind(Counter, count, formats=("json",)),
    "marked loader": Kind(Loader, count, formats=("json",)),
    "custom hook": Kind(
        Counter,
        count,
        formats=("json",),
        load=lambda name, obj, path: load_object(name, obj, path, custom_hook=Counter.read),
    ),
}


def save(state: Any, form: str, path: Path) -> None:
    if form == "safetensors":
        # A safetensors file holds a tied tensor under one key only.
        safetensors.torch.save_file({key: value for key, value in state.items() if key != "head.weight"}, path)
    elif form == "bytes":
        path.write_bytes(state)
    elif form == "json":
        path.write_text(json.dumps(state))
    else:
        torch.save(state, path, _use_new_zipfile_serialization=form == "torch zip")


def snapshot(value: Any) -> Any:
    """Return a copy of a state that is compared by value."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.tolist()
    if isinstance(value, Mapping):
        return {key: snapshot(each) for key, each in value.items()}
    return [snapshot(each) for each in value] if isinstance(value, (list, tuple)) else value


@dataclass(frozen=True)
class Subject:
    """An object of a kind, and a file for it with a different state."""

    kind: Kind
    obj: Any
    path: Path
    expected: Any

    def state(self) -> Any:
        return snapshot(self.kind.state(self.obj))

    def load(self) -> None:
        self.kind.load("thing", self.obj, self.path)


@pytest.fixture(params=[f"{name} from {form}" for name, kind in KINDS.items() for form in kind.formats])
def subject(request: pytest.FixtureRequest, tmp_path: Path) -> Subject:
    name, _, form = request.param.partition(" from ")
    kind = KINDS[name]
    saved = kind.make()
    kind.change(saved)
    path = tmp_path / "thing.ckpt"
    save(kind.state(saved), form, path)
    return Subject(kind, kind.make(), path, snapshot(kind.state(saved)))


def fails(subject: Subject) -> LoadError:
    """Load, and check the rules for every failure; return the error."""
    before = subject.state()
    with pytest.raises(LoadError) as caught:
        subject.load()
    error = caught.value
    assert subject.state() == before, "the object was changed"
    assert str(subject.path) in str(error)
    assert error.subject == str(subject.path)
    travelled = pickle.loads(pickle.dumps(error))
    assert (type(travelled), str(travelled), travelled.subject) == (type(error), str(error), error.subject)
    assert "weights_only" not in str(error)
    return error


def test_loads_the_saved_state_from_a_file_of_any_name(subject: Subject) -> None:
    assert subject.state() != subject.expected
    subject.load()
    assert subject.state() == subject.expected


def test_accepts_the_path_as_text(subject: Subject) -> None:
    subject.kind.load("thing", subject.obj, str(subject.path))  # type: ignore[arg-type]
    assert subject.state() == subject.expected


def test_keeps_nothing_of_the_file(subject: Subject) -> None:
    subject.load()
    with subject.path.open("r+b") as file:
        file.write(bytes(subject.path.stat().st_size))
    assert subject.state() == subject.expected


@pytest.mark.parametrize("fraction", [0.0, 0.001, 0.3, 0.7, 0.99])
def test_truncated(subject: Subject, fraction: float) -> None:
    content = subject.path.read_bytes()
    subject.path.write_bytes(content[: int(len(content) * fraction)])
    fails(subject)


def test_truncated_by_one_byte(subject: Subject) -> None:
    content = subject.path.read_bytes()
    subject.path.write_bytes(content[:-1])
    fails(subject)


def test_a_page_in_place_of_the_file(subject: Subject) -> None:
    subject.path.write_text("<!DOCTYPE html><html><body>Sign in</body></html>")
    fails(subject)


def test_missing_file(subject: Subject) -> None:
    subject.path.unlink()
    fails(subject)


def test_a_folder_in_place_of_the_file(subject: Subject) -> None:
    subject.path.unlink()
    subject.path.mkdir()
    fails(subject)
