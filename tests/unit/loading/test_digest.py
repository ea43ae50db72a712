"""Digests of what ranks hold, and what is said when they differ."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from weightferry.loading.digest import different, explain_difference, tensor_digests, total


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)


def test_equal_numbers_have_equal_digests() -> None:
    assert tensor_digests(network()) == tensor_digests(network())
    assert set(tensor_digests(network())) == set(network().state_dict())


def flip(module: nn.Module) -> None:
    module.get_parameter("0.weight").data.view(torch.int16)[3, 3] ^= 1


def swap(module: nn.Module) -> None:
    weight = module.get_parameter("0.weight").data
    weight[0, [0, 1]] = weight[0, [1, 0]].clone()


@pytest.mark.parametrize("change", [flip, swap, nn.Module.double])
def test_any_difference_shows(change: Callable[[nn.Module], object]) -> None:
    changed = network()
    change(changed)
    mine, theirs = tensor_digests(network()), tensor_digests(changed)
    assert total(mine) != total(theirs)
    error = explain_difference("model", {0: mine, 1: mine, 2: theirs}, (0, 1, 2))
    assert "'0.weight'" in str(error)
    assert "ranks 0-1 have" in str(error)
    assert "ranks 2 have" in str(error)


def test_optimizers_count() -> None:
    def stepped(rate: float) -> torch.optim.Optimizer:
        module = nn.Linear(2, 2)
        nn.init.ones_(module.weight)
        optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return optimizer

    assert tensor_digests(stepped(1.0)) == tensor_digests(stepped(1.0))
    assert tensor_digests(stepped(1.0)) != tensor_digests(stepped(2.0))


def test_what_has_no_state_is_left_out() -> None:
    assert tensor_digests(object()) == {}
    with torch.device("meta"):
        assert set(tensor_digests(nn.Linear(2, 2))) == {"weight", "bias"}


def test_names_are_compared_where_they_are() -> None:
    said = {0: {"a": 1, "b": 2}, 1: {"a": 1, "b": 3}, 2: {"c": 9}}
    assert different(said) == ("b",)
