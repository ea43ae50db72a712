"""Digests of the state of a loadable, and the error when they differ between ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn

from weightferry.loading.digest import combine_digests, difference_error, find_differing, tensor_digests


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)).to(torch.bfloat16)


def test_equal_values_have_equal_digests() -> None:
    assert tensor_digests(network()) == tensor_digests(network())
    assert set(tensor_digests(network())) == set(network().state_dict())


def flip(module: nn.Module) -> None:
    module.get_parameter("0.weight").data.view(torch.int16)[3, 3] ^= 1


def swap(module: nn.Module) -> None:
    weight = module.get_parameter("0.weight").data
    weight[0, [0, 1]] = weight[0, [1, 0]].clone()


@pytest.mark.parametrize("change", [flip, swap, nn.Module.double])
def test_the_error_names_the_tensor_and_the_ranks(change: Callable[[nn.Module], object]) -> None:
    changed = network()
    change(changed)
    first, second = tensor_digests(network()), tensor_digests(changed)
    assert combine_digests(first) != combine_digests(second)
    error = difference_error("model", {0: first, 1: first, 2: second}, (0, 1, 2))
    assert "'0.weight'" in str(error)
    assert "on ranks 0-1" in str(error)
    assert "on rank 2" in str(error)


def test_optimizers_are_compared() -> None:
    def stepped(rate: float) -> torch.optim.Optimizer:
        module = nn.Linear(2, 2)
        nn.init.ones_(module.weight)
        optimizer = torch.optim.SGD(module.parameters(), lr=rate, momentum=0.9)
        module(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        return optimizer

    assert tensor_digests(stepped(1.0)) == tensor_digests(stepped(1.0))
    assert tensor_digests(stepped(1.0)) != tensor_digests(stepped(2.0))


def test_an_object_without_a_state_has_no_digests() -> None:
    assert tensor_digests(object()) == {}
    with torch.device("meta"):
        assert set(tensor_digests(nn.Linear(2, 2))) == {"weight", "bias"}


def test_a_loadable_is_compared_between_the_ranks_that_have_it() -> None:
    combined = {0: {"a": 1, "b": 2}, 1: {"a": 1, "b": 3}, 2: {"c": 9}}
    assert find_differing(combined) == ("b",)
