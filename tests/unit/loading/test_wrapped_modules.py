from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from weightferry.loading.hooks import load_module, transfer_module
from weightferry.loading.keys import align_keys, unwrap
from weightferry.loading.load_object import load_object


class Net(nn.Module):
    """Has a child with the name "module" that is not the child of a wrapper."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder: nn.Module = nn.Linear(3, 4)
        self.module = nn.BatchNorm1d(4)


@pytest.fixture(scope="module")
def process_group() -> Iterator[None]:
    """Initialize a gloo group with only this process, without a port."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    # The import of the default backend takes seconds; nothing is compiled here.
    wrapper = torch.compile(module, backend="eager")
    assert isinstance(wrapper, nn.Module)
    return wrapper


def plain(module: nn.Module) -> nn.Module:
    return module


def ddp(module: nn.Module) -> nn.Module:
    return nn.parallel.DistributedDataParallel(module)


def compiled_inside(net: nn.Module) -> nn.Module:
    net.encoder = compiled(net.get_submodule("encoder"))
    return net


def ddp_inside(net: nn.Module) -> nn.Module:
    net.encoder = ddp(net.get_submodule("encoder"))
    return net


WRAPS: list[Callable[[nn.Module], nn.Module]] = [
    plain,
    nn.DataParallel,
    compiled,
    ddp,
    compiled_inside,
    ddp_inside,
    lambda net: compiled(ddp(net)),
    lambda net: ddp(compiled(net)),
]


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("into", WRAPS)
@pytest.mark.parametrize("saved_from", WRAPS)
def test_any_wrapping_loads_into_any_other(
    saved_from: Callable[[nn.Module], nn.Module],
    into: Callable[[nn.Module], nn.Module],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = Net()
    saved.module.get_buffer("num_batches_tracked").fill_(7)
    torch.save(saved_from(saved).state_dict(), tmp_path / "net.ckpt")
    for hook in (transfer_module, load_module):
        net = Net()
        hook(into(net), tmp_path / "net.ckpt")
        for loaded, expected in zip(net.state_dict().values(), saved.state_dict().values(), strict=True):
            assert torch.equal(loaded, expected)
    assert caplog.records == []


@pytest.mark.usefixtures("process_group")
def test_ddp_still_trains_what_was_loaded(tmp_path: Path) -> None:
    torch.save({"weight": torch.full((1, 2), 3.0), "bias": torch.zeros(1)}, tmp_path / "net.ckpt")
    net = nn.parallel.DistributedDataParallel(nn.Linear(2, 1))
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    load_object("net", net, tmp_path / "net.ckpt")
    assert net(torch.ones(1, 2)).item() == 6.0
    net(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert torch.equal(net.module.weight, torch.full((1, 2), 2.0))


def test_unwrap() -> None:
    net = Net()
    assert unwrap(net) is net
    assert unwrap(nn.DataParallel(compiled(net))) is net


def aligned(keys: list[str], module: nn.Module) -> list[str]:
    return list(align_keys(dict.fromkeys(keys), module, module.state_dict().keys()))


def test_a_prefix_that_only_some_keys_have_stays() -> None:
    keys = ["encoder.weight", "module.weight", "module.bias"]
    assert aligned(keys, Net()) == keys


def test_the_child_named_module_keeps_its_name() -> None:
    assert aligned(["module.weight", "module.bias"], Net()) == ["module.weight", "module.bias"]
    assert aligned(["module.module.weight", "module.encoder.bias"], Net()) == ["module.weight", "encoder.bias"]


def test_keys_that_would_become_one_stay_two() -> None:
    keys = ["encoder._orig_mod.weight", "encoder.weight"]
    assert aligned(keys, Net()) == keys
    assert aligned(keys, compiled_inside(Net())) == keys


def test_keys_that_fit_nowhere_stay() -> None:
    assert aligned(["module.other"], nn.Linear(1, 1)) == ["module.other"]
    assert aligned([], nn.Linear(1, 1)) == []


def test_versions_follow_their_modules(tmp_path: Path) -> None:
    """BatchNorm reads a state without versions as one from before versions existed."""
    state = nn.DataParallel(Net()).state_dict()
    result = align_keys(state, Net(), Net().state_dict().keys())
    versions = result._metadata  # type: ignore[attr-defined]
    assert versions["module"] == {"version": 2}
    assert versions["encoder"] == {"version": 1}
    inside = compiled_inside(Net())
    result = align_keys(state, inside, inside.state_dict().keys())
    assert "encoder._orig_mod" in result._metadata  # type: ignore[attr-defined]
