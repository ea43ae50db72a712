"""weightferry's Pretrainer and SpeechBrain's on thirty generated set-ups: the same files, values and errors."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from speechbrain.utils import checkpoints
from speechbrain.utils.parameter_transfer import Pretrainer as SpeechBrainPretrainer
from torch import nn

import weightferry


@checkpoints.register_checkpoint_hooks
class Scaler:
    """Like SpeechBrain's InputNormalization: it loads itself with a marked method."""

    def __init__(self) -> None:
        self.mean = torch.zeros(3)

    @checkpoints.mark_as_transfer  # type: ignore[untyped-decorator]
    def read(self, path: Any) -> None:
        self.mean = torch.load(path, weights_only=True)["mean"]

    def state(self) -> Any:
        return self.mean.tolist()


@checkpoints.register_checkpoint_hooks
class Counter:
    """Loads itself with a marked loader."""

    def __init__(self) -> None:
        self.count = 0

    @checkpoints.mark_as_saver  # type: ignore[untyped-decorator]
    def write(self, path: Any) -> None:
        Path(path).write_text(str(self.count))

    @checkpoints.mark_as_loader  # type: ignore[untyped-decorator]
    def read(self, path: Any, end_of_epoch: bool) -> None:
        assert end_of_epoch is False
        self.count = int(Path(path).read_text())

    def state(self) -> Any:
        return self.count


class Labels:
    """Like a label encoder: its type has no hook, a custom hook loads it."""

    def __init__(self) -> None:
        self.names: list[str] = []

    def state(self) -> Any:
        return self.names


def load_labels(labels: Labels, path: Any) -> None:
    labels.names = json.loads(Path(path).read_text())


def state_of(obj: Any) -> Any:
    if isinstance(obj, nn.Module):
        return {key: tensor.tolist() for key, tensor in obj.state_dict().items()}
    if isinstance(obj, torch.optim.Optimizer):
        return json.loads(json.dumps(obj.state_dict(), default=lambda tensor: tensor.tolist()))
    return obj.state()


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))


@dataclass
class SetUp:
    """The arguments of one Pretrainer; created twice from the same seed."""

    loadables: dict[str, Any] = field(default_factory=dict)
    paths: dict[str, str] = field(default_factory=dict)
    custom_hooks: dict[str, Any] = field(default_factory=dict)
    conditions: dict[str, Any] = field(default_factory=dict)
    default_source: str | None = None


def write(kind: str, path: Path, rng: random.Random) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    if kind == "module":
        state = {key: torch.full_like(tensor, rng.random()) for key, tensor in network().state_dict().items()}
        for key in rng.sample(sorted(state), rng.choice([0, 0, 1, 2])):
            del state[key]
        if rng.random() < 0.3:
            state["left.over"] = torch.ones(2)
        torch.save(state, path)
    elif kind == "optimizer":
        optimizer = torch.optim.SGD(network().parameters(), lr=rng.random(), momentum=0.5)
        torch.save(optimizer.state_dict(), path)
    elif kind == "scaler":
        torch.save({"mean": torch.full((3,), rng.random())}, path)
    elif kind == "counter":
        path.write_text(str(rng.randrange(100)))
    else:
        path.write_text(json.dumps([f"label{rng.randrange(9)}" for _ in range(3)]))


MAKE = {
    "module": network,
    "optimizer": lambda: torch.optim.SGD(network().parameters(), lr=1.0, momentum=0.5),
    "scaler": Scaler,
    "counter": Counter,
    "labels": Labels,
}


def make(seed: int, folder: Path) -> SetUp:
    """Create a set-up and write its files; the same seed gives the same files."""
    rng = random.Random(seed)
    made = SetUp()
    defaults = folder / "default"
    if rng.random() < 0.9:
        made.default_source = str(defaults)
    for number in range(rng.randrange(1, 5)):
        kind = rng.choice(sorted(MAKE))
        name = f"{kind}{number}"
        made.loadables[name] = MAKE[kind]()
        if rng.random() < 0.5:
            path = folder / rng.choice(["a", "b/c"]) / f"{name}.{rng.choice(['ckpt', 'pt', 'txt'])}"
            made.paths[name] = str(path)
        else:
            path = defaults / f"{name}.ckpt"
        if rng.random() < 0.95:
            write(kind, path, rng)
        if kind == "labels" and rng.random() < 0.9:
            made.custom_hooks[name] = load_labels
        condition = rng.choice([None, None, None, True, False, lambda: True, lambda: False])
        if condition is not None:
            made.conditions[name] = condition
    return made


def outcome(pretrainer: Any, made: SetUp) -> tuple[str, Mapping[str, bytes], Mapping[str, Any]]:
    """Collect and load; return the step that failed or "", the collected files, and the state of all objects."""
    found: Mapping[str, Any] = {}
    failed = ""
    try:
        found = pretrainer.collect_files(made.default_source)
        failed = "load"
        pretrainer.load_collected()
        failed = ""
    except Exception:  # noqa: BLE001 -- the two packages raise different classes
        failed = failed or "collect"
    collected = {name: Path(path).read_bytes() for name, path in found.items()}
    return failed, collected, {name: state_of(obj) for name, obj in made.loadables.items()}


SEEDS = range(30)


@pytest.mark.parametrize("collect_in", ["links", None])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_same_as_speechbrain(seed: int, collect_in: str | None, tmp_path: Path) -> None:
    results = []
    for kind in (weightferry.Pretrainer, SpeechBrainPretrainer):
        made = make(seed, tmp_path)
        into = tmp_path / collect_in / kind.__module__ if collect_in else None
        if into:
            into.parent.mkdir(exist_ok=True)
        pretrainer = kind(into, made.loadables, made.paths, made.custom_hooks, made.conditions)
        results.append(outcome(pretrainer, made))
        if into and not results[-1][0]:
            assert sorted(path.name for path in into.iterdir()) == sorted(f"{name}.ckpt" for name in results[-1][1])
    weightferry_result, speechbrain_result = results
    assert weightferry_result[0] == speechbrain_result[0]
    assert weightferry_result[1] == speechbrain_result[1]
    if not weightferry_result[0]:
        # After a failure, SpeechBrain may have written some objects; weightferry has written none.
        assert weightferry_result[2] == speechbrain_result[2]


def test_the_seeds_cover_success_and_failure(tmp_path: Path) -> None:
    outcomes = []
    for seed in SEEDS:
        made = make(seed, tmp_path / str(seed))
        pretrainer = weightferry.Pretrainer(None, made.loadables, made.paths, made.custom_hooks, made.conditions)
        outcomes.append(outcome(pretrainer, made)[0])
    assert outcomes.count("") >= 15
    assert {"collect", "load"} <= set(outcomes)
