from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from weightferry.errors import LoadError
from weightferry.loading.hooks import load_module, transfer_module
from weightferry.loading.options import LoadOptions

LOGGER = "weightferry.loading.hooks"
Hook = Callable[[nn.Module, Path], None]
BOTH = pytest.mark.parametrize("hook", [transfer_module, load_module])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "net.ckpt"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def refused(hook: Hook, module: nn.Module, path: Path) -> str:
    """Load, check that it fails without writing anything, and return the text of the error."""
    before = {key: tensor.clone() for key, tensor in module.state_dict().items() if isinstance(tensor, torch.Tensor)}
    with pytest.raises(LoadError) as caught:
        hook(module, path)
    for key, tensor in before.items():
        if not tensor.is_meta:
            assert torch.equal(module.state_dict()[key], tensor), f"{key} was written"
    assert str(path) in str(caught.value)
    assert caught.value.subject == str(path)
    return str(caught.value)


def messages(caplog: pytest.LogCaptureFixture, level: int) -> list[str]:
    return [record.getMessage() for record in caplog.records if (record.name, record.levelno) == (LOGGER, level)]


def test_missing_and_unexpected_are_one_warning_each(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {f"head.{number}": torch.ones(1) for number in range(30)} | {"0.weight": torch.ones(4, 3)}
    torch.save(state, path)
    module = network()
    bias = module.get_parameter("0.bias").clone()
    transfer_module(module, path)
    assert torch.equal(module.get_parameter("0.weight"), torch.ones(4, 3))
    assert torch.equal(module.get_parameter("0.bias"), bias)
    missing, unexpected = messages(caplog, logging.WARNING)
    assert "7 of the 9 keys of Sequential are not in the file and keep their values: 0.bias, 1.weight" in missing
    assert "30 of the 31 keys in the file are not in Sequential and are ignored" in unexpected
    assert "head.19 and 10 more" in unexpected
    assert all(str(path) in each for each in (missing, unexpected))


def test_a_complete_match_logs_nothing(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(network().state_dict(), path)
    with caplog.at_level(logging.INFO):
        transfer_module(network(), path)
        load_module(network(), path)
    assert caplog.records == []


def test_strict_lists_missing_and_unexpected_keys(path: Path) -> None:
    torch.save({**nn.Linear(3, 4).state_dict(), "more": torch.ones(1)}, path)
    text = refused(load_module, nn.Linear(3, 4), path)
    assert "Missing (0): none. Unexpected (1): more" in text
    torch.save({"weight": torch.ones(4, 3)}, path)
    assert "Missing (1): bias. Unexpected (0): none" in refused(load_module, nn.Linear(3, 4), path)


@BOTH
def test_every_wrong_shape_is_listed(hook: Hook, path: Path) -> None:
    other = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2))
    torch.save(other.state_dict(), path)
    text = refused(hook, network(), path)
    assert "7 tensors do not fit" in text
    assert "0.weight: (5, 3) in the file, (4, 3) in the module" in text
    assert "1.running_mean: (5,) in the file, (4,) in the module" in text
    assert "2.weight: (2, 5) in the file, (2, 4) in the module" in text


@BOTH
def test_values_that_are_not_tensors(hook: Hook, path: Path) -> None:
    torch.save({"weight": [1.0, 2.0], "bias": torch.ones(4)}, path)
    assert "weight: list in the file, a tensor in the module" in refused(hook, nn.Linear(3, 4), path)


@BOTH
@pytest.mark.parametrize("state", [[torch.ones(1)], torch.ones(3), None, "weights", 3])
def test_a_file_without_a_mapping(hook: Hook, state: Any, path: Path) -> None:
    torch.save(state, path)
    assert f"holds a {type(state).__name__}, not a mapping" in refused(hook, nn.Linear(3, 4), path)


@BOTH
def test_keys_that_are_not_strings(hook: Hook, path: Path) -> None:
    torch.save({"weight": torch.ones(4, 3), 0: torch.ones(4), float("nan"): torch.ones(1)}, path)
    assert "keys that are not strings: 0, nan" in refused(hook, nn.Linear(3, 4), path)


@BOTH
@pytest.mark.parametrize("key", ["state_dict", "model"])
def test_nested_checkpoints_are_described_not_guessed(hook: Hook, key: str, path: Path) -> None:
    torch.save({key: network().state_dict(), "epoch": 3}, path)
    text = refused(hook, network(), path)
    assert f"The file has: {key}, epoch" in text
    assert f"'{key}' (a mapping of 9)" in text
    assert f"read_state(path)['{key}']" in text


@BOTH
def test_no_key_fits(hook: Hook, path: Path) -> None:
    torch.save({f"encoder.{number}": torch.ones(1) for number in range(9)}, path)
    text = refused(hook, network(), path)
    assert "none of the 9 keys" in text
    assert "The file has: encoder.0, encoder.1, encoder.2, encoder.3, encoder.4 and 4 more" in text
    assert "Sequential has: 0.weight, 0.bias, 1.weight, 1.bias, 1.running_mean and 4 more" in text


@BOTH
def test_an_empty_file_for_a_module_with_parameters(hook: Hook, path: Path) -> None:
    torch.save({}, path)
    assert "none of the 0 keys" in refused(hook, network(), path)


def test_a_module_without_parameters_takes_any_file(path: Path) -> None:
    torch.save({"weight": torch.ones(1)}, path)
    transfer_module(nn.ReLU(), path)
    torch.save({}, path)
    load_module(nn.ReLU(), path)


def test_dtypes_are_converted_and_logged(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save(nn.Linear(3, 4).half().state_dict(), path)
    module = nn.Linear(3, 4)
    with caplog.at_level(logging.INFO):
        load_module(module, path)
    assert module.weight.dtype == torch.float32
    (message,) = messages(caplog, logging.INFO)
    assert "2 tensors converted from torch.float16 to torch.float32: " in message


def test_a_lossy_conversion_is_a_warning(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    module = nn.Module()
    module.register_buffer("position", torch.zeros(2, dtype=torch.int64))
    torch.save({"position": torch.tensor([1.5, 2.0])}, path)
    load_module(module, path)
    (message,) = messages(caplog, logging.WARNING)
    assert "torch.float32 to torch.int64, which cannot hold every value: position" in message


@BOTH
def test_complex_into_real_is_refused(hook: Hook, path: Path) -> None:
    torch.save({"weight": torch.ones(4, 3, dtype=torch.complex64), "bias": torch.ones(4)}, path)
    assert "imaginary" in refused(hook, nn.Linear(3, 4), path)


@BOTH
def test_parameters_stay_the_same_objects(hook: Hook, path: Path) -> None:
    torch.save(network().state_dict(), path)
    module = network()
    before = {key: (id(each), each.data_ptr()) for key, each in module.named_parameters()}
    requires = module.get_parameter("0.weight").requires_grad_(False)
    hook(module, path)
    assert {key: (id(each), each.data_ptr()) for key, each in module.named_parameters()} == before
    assert not requires.requires_grad
    assert all(each.grad_fn is None for each in module.parameters())


@BOTH
def test_a_flag_to_assign_in_the_file_is_ignored(hook: Hook, path: Path) -> None:
    state = nn.Linear(3, 4).state_dict()
    nn.Linear(3, 4).load_state_dict(state, assign=True)
    torch.save(state, path)
    module = nn.Linear(3, 4)
    before = module.weight
    hook(module, path)
    assert module.weight is before


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


@BOTH
@pytest.mark.parametrize("kept", ["embed.weight", "head.weight"])
def test_tied_parameters_under_one_name(hook: Hook, kept: str, path: Path, caplog: pytest.LogCaptureFixture) -> None:
    safetensors.torch.save_file({kept: torch.full((5, 3), 2.0)}, path)
    module = Tied()
    hook(module, path)
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.head.weight, torch.full((5, 3), 2.0))
    assert messages(caplog, logging.WARNING) == []


@BOTH
def test_modules_on_the_meta_device_get_memory(hook: Hook, path: Path) -> None:
    saved = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    torch.save(saved.state_dict(), path)
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    module.get_parameter("0.weight").requires_grad_(False)
    hook(module, path)
    for key, tensor in module.state_dict().items():
        assert torch.equal(tensor, saved.state_dict()[key].to(tensor.dtype)), key
    weight, bias = module.get_parameter("0.weight"), module.get_parameter("0.bias")
    assert weight.dtype == torch.float64
    assert [each.requires_grad for each in module.parameters()] == [False, True, True, True]
    bias.data.fill_(5)
    assert torch.equal(torch.load(path)["0.bias"], saved.get_parameter("0.bias")), "no memory shared with the file"


@BOTH
def test_tied_tensors_on_the_meta_device_stay_tied(hook: Hook, path: Path) -> None:
    safetensors.torch.save_file({"embed.weight": torch.full((5, 3), 2.0)}, path)
    with torch.device("meta"):
        module = Tied()
    hook(module, path)
    assert module.head.weight is module.embed.weight
    assert torch.equal(module.head.weight, torch.full((5, 3), 2.0))


@BOTH
def test_a_tensor_that_would_stay_on_the_meta_device_is_an_error(hook: Hook, path: Path) -> None:
    torch.save({"weight": torch.ones(4, 3), "bais": torch.ones(4)}, path)
    text = refused(hook, nn.Linear(3, 4, device="meta"), path)
    assert "bias (the file has bais)" in text


def test_missing_keys_come_with_the_closest_names(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    torch.save({"weight": torch.ones(4, 3), "bais": torch.ones(4)}, path)
    module = nn.Linear(3, 4)
    transfer_module(module, path)
    assert "bias (the file has bais)" in messages(caplog, logging.WARNING)[0]
    with pytest.raises(LoadError, match=r"bias \(the file has bais\)"):
        transfer_module(module, path, LoadOptions(strict=True))


@pytest.mark.parametrize(
    "rename",
    [
        {"encoder.": "", "encoder.linear.bias": "bias", "encoder.linear.": ""},
        lambda key: key.rpartition(".")[2] if key.startswith("encoder.") else None,
    ],
)
def test_keys_are_renamed(rename: Any, path: Path) -> None:
    torch.save({"encoder.linear.weight": torch.ones(4, 3), "encoder.linear.bias": torch.ones(4)}, path)
    module = nn.Linear(3, 4)
    transfer_module(module, path, LoadOptions(strict=True, rename=rename))
    assert module.weight.sum() == 12


def test_two_keys_of_one_new_name(path: Path) -> None:
    torch.save({"a.weight": torch.ones(4, 3), "b.weight": torch.ones(4, 3)}, path)
    with pytest.raises(LoadError, match="would both be renamed") as caught:
        transfer_module(nn.Linear(3, 4), path, LoadOptions(rename={"a.": "", "b.": ""}))
    assert caught.value.subject == str(path)


def test_counters_that_old_files_lack(path: Path) -> None:
    """torch fills in `num_batches_tracked` for files from before this counter existed."""
    state = {key: tensor for key, tensor in network().state_dict().items() if "num_batches" not in key}
    safetensors.torch.save_file(state, path)
    load_module(network(), path)


def test_scalars_of_old_files(path: Path) -> None:
    module = nn.Module()
    module.register_buffer("scale", torch.tensor(0.0))
    torch.save({"scale": torch.tensor([4.0])}, path)
    load_module(module, path)
    assert module.get_buffer("scale") == 4.0


class Growing(nn.Module):
    """Loads a buffer of any length, with the method that torch documents for this."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("seen", torch.zeros(0))

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *rest: Any) -> None:
        if prefix + "seen" in state_dict:
            self.seen = torch.zeros_like(state_dict[prefix + "seen"])
        super()._load_from_state_dict(state_dict, prefix, *rest)


@BOTH
def test_a_module_may_resize_its_buffer(hook: Hook, path: Path) -> None:
    growing = Growing()
    module = nn.Sequential(nn.Linear(1, 1), growing)
    torch.save({**module.state_dict(), "1.seen": torch.ones(7)}, path)
    hook(module, path)
    assert torch.equal(growing.seen, torch.ones(7))


@BOTH
def test_wrong_shapes_beside_such_a_module_are_found_before_writing(hook: Hook, path: Path) -> None:
    module = nn.Sequential(nn.Linear(1, 1), Growing())
    torch.save({"0.weight": torch.ones(2, 2), "0.bias": torch.ones(1), "1.seen": torch.ones(7)}, path)
    assert "0.weight: (2, 2)" in refused(hook, module, path)


def test_no_key_fits_such_a_module(path: Path) -> None:
    torch.save({"other": torch.ones(7)}, path)
    assert "none of the 1 keys" in refused(transfer_module, Growing(), path)


@BOTH
def test_old_names_that_a_module_translates_itself(hook: Hook, path: Path) -> None:
    """torch's parametrized weight norm accepts the keys of the older weight norm."""
    torch.save({"weight_g": torch.ones(4, 1), "weight_v": torch.ones(4, 3), "bias": torch.ones(4)}, path)
    module = nn.utils.parametrizations.weight_norm(nn.Linear(3, 4))
    hook(module, path)
    assert torch.equal(module.bias, torch.ones(4))
    torch.testing.assert_close(module.weight, torch.full((4, 3), 3**-0.5))


class OwnLoad(nn.Linear):
    """Overrides load_state_dict without `strict`, as user code does."""

    def load_state_dict(self, state_dict: Any) -> None:  # type: ignore[override]
        super().load_state_dict({key.removeprefix("old_"): tensor for key, tensor in state_dict.items()})


@BOTH
def test_a_class_with_its_own_load_state_dict(hook: Hook, path: Path) -> None:
    torch.save({"old_weight": torch.ones(4, 3), "old_bias": torch.ones(4)}, path)
    module = OwnLoad(3, 4)
    hook(module, path)
    assert torch.equal(module.weight, torch.ones(4, 3))


class OnlyHead(nn.Linear):
    """Has only its trained parameters in its state, as adapters do."""

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return {key: tensor for key, tensor in super().state_dict(*args, **kwargs).items() if key == "bias"}


def test_a_class_with_its_own_state_dict(path: Path) -> None:
    torch.save({"bias": torch.ones(4)}, path)
    module = OnlyHead(3, 4)
    transfer_module(module, path)
    assert torch.equal(module.bias, torch.ones(4))


class Extra(nn.Linear):
    extra = 0

    def get_extra_state(self) -> int:
        return self.extra

    def set_extra_state(self, state: int) -> None:
        self.extra = state


@BOTH
def test_extra_state(hook: Hook, path: Path) -> None:
    saved = Extra(3, 4)
    saved.extra = 5
    torch.save(saved.state_dict(), path)
    module = Extra(3, 4)
    hook(module, path)
    assert module.extra == 5


def test_lazy_parameters_take_the_shape_of_the_file(path: Path) -> None:
    torch.save(nn.Linear(3, 4).state_dict(), path)
    module = nn.LazyLinear(4)
    transfer_module(module, path)
    assert module.weight.shape == (4, 3)
