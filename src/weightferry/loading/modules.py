"""Whether a state fits a module, found out before anything is written; and the copy into its parameters."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from weightferry.loading.device_copy import CudaDeviceCopier, may_be_placed, place
from weightferry.loading.dtensor import is_dtensor, local_shard
from weightferry.loading.keys import align

if TYPE_CHECKING:
    from collections.abc import Mapping

# Reads of torch's own that need the shapes of the module. What overrides them may resize, rename or fill in.
_PLAIN_READS = frozenset(cls._load_from_state_dict for cls in (nn.Module, nn.BatchNorm1d, nn.InstanceNorm1d))
# Files from before torch 0.4.1 lack these counters, and torch fills them in.
_FILLED_IN = "num_batches_tracked"


@dataclass(frozen=True)
class ModuleFit:
    """How a state fits a module; nothing is written yet.

    Attributes
    ----------
    module
        The module, no wrapper.
    wanted
        Its own `state_dict`.
    given
        The file's tensors under the module's names.
    missing, unexpected
        Keys that only the module has, and that only the file has.
    offenders
        One line for each tensor that cannot be copied to where its name belongs.
    conversions
        By (dtype in the file, dtype in the module), the keys whose values are converted.
    free
        Prefixes of the keys of submodules that read their state in a way of their own; about these nothing is known
        before they have read.
    """

    module: nn.Module
    wanted: Mapping[str, Any]
    given: dict[str, Any]
    missing: list[str]
    unexpected: list[str]
    free: tuple[str, ...]
    offenders: list[str] = field(default_factory=list)
    conversions: dict[tuple[torch.dtype, torch.dtype], list[str]] = field(default_factory=dict)

    @property
    def without_value(self) -> list[str]:
        """Keys of the module's tensors that are on the meta device, and would get no value from this file."""
        return [
            key
            for key, tensor in self.wanted.items()
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and key not in self.given
        ]

    @property
    def none_fits(self) -> bool:
        """Whether the module wants something, and gets nothing at all."""
        return bool(self.wanted) and not self.free and not any(key in self.wanted for key in self.given)

    def certain(self, keys: list[str]) -> list[str]:
        """Return those of `keys` that no submodule with a way of its own may account for."""
        return [key for key in keys if not key.startswith(self.free)]


def fit(state: Mapping[str, Any], module: nn.Module) -> ModuleFit:
    """Compare `state` with `module`; neither is changed, and of tensors only shapes and dtypes are looked at."""
    wanted = _own_state(module)
    given = align(state, module, wanted)
    _fill_in_tied(given, wanted)
    result = ModuleFit(
        module=module,
        wanted=wanted,
        given=given,
        missing=[key for key in wanted if key not in given and not key.endswith(_FILLED_IN)],
        unexpected=[key for key in given if key not in wanted],
        free=_free_prefixes(module),
    )
    for key in given.keys() & wanted.keys():
        _compare(key, given[key], wanted[key], result)
    result.offenders.sort()
    return result


def copy_into(fitted: ModuleFit, *, strict: bool, device: str | None = None) -> tuple[list[str], list[str]]:
    """Copy the given tensors into the module's parameters and buffers, which stay the same objects.

    Those on the meta device are replaced by new ones first, on `device`; tied ones by one. Of DTensors each rank
    copies only the part that it owns.

    Returns
    -------
    tuple[list[str], list[str]]
        Missing and unexpected keys, as the module itself counts them. Classes may override `load_state_dict` with one
        that takes the state alone, or that returns nothing; then both are empty.
    """
    wanted = _own_state(fitted.module) if _give_memory(fitted, device or "cpu") else fitted.wanted
    for key, tensor in wanted.items():
        if is_dtensor(tensor) and key in fitted.given:
            fitted.given[key] = local_shard(fitted.given[key], tensor)
    _place(fitted, wanted)
    load: Any = fitted.module.load_state_dict
    result = load(fitted.given, strict=strict) if _takes_strict(load) else load(fitted.given)
    return ([], []) if result is None else (list(result.missing_keys), list(result.unexpected_keys))


def _place(fitted: ModuleFit, wanted: Mapping[str, Any]) -> None:
    """Bring what goes to a GPU as it is there; the module then copies each of these tensors onto itself."""
    by_device: dict[torch.device, list[str]] = {}
    for key in fitted.certain([key for key in fitted.given if key in wanted]):
        if may_be_placed(fitted.given[key], wanted[key]):
            by_device.setdefault(wanted[key].device, []).append(key)
    for device, keys in by_device.items():
        place(((fitted.given[key], wanted[key]) for key in keys), CudaDeviceCopier(device))
        fitted.given.update((key, wanted[key].detach()) for key in keys)


def _give_memory(fitted: ModuleFit, device: str) -> bool:
    """Put tensors with memory in place of those on the meta device that the file has values for; tell if any was."""
    made: dict[int, torch.Tensor] = {}
    values = {id(tensor) for key, tensor in fitted.wanted.items() if key in fitted.given}
    for module in fitted.module.modules():
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)  # noqa: SLF001 - setattr calls hooks
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta and id(tensor) in values:
                    tensors[name] = made.setdefault(id(tensor), _with_memory(tensor, device))
    return bool(made)


def _with_memory(tensor: torch.Tensor, device: str) -> torch.Tensor:
    empty = torch.empty_like(tensor, device=device, requires_grad=False)
    if not isinstance(tensor, nn.Parameter):
        return empty
    made = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    made.__dict__.update(tensor.__dict__)  # marks that libraries put on parameters
    return made


def _own_state(module: nn.Module) -> Mapping[str, Any]:
    if _overrides(module, "state_dict"):
        return dict(module.state_dict())
    return dict(module.state_dict(keep_vars=True))


def _fill_in_tied(given: dict[str, Any], wanted: Mapping[str, Any]) -> None:
    """Give a tensor that has several names under all of them: safetensors files hold it under one."""
    twins: dict[int, list[str]] = {}
    for key, tensor in wanted.items():
        twins.setdefault(id(tensor), []).append(key)
    for keys in twins.values():
        here = [key for key in keys if key in given]
        given.update({key: given[here[0]] for key in keys if here and key not in given})


def _compare(key: str, theirs: Any, ours: Any, result: ModuleFit) -> None:
    if not isinstance(ours, torch.Tensor) or is_lazy(ours) or not result.certain([key]):
        return
    offence = _offence(theirs, ours)
    if offence:
        result.offenders.append(f"{key}: {offence}")
    elif theirs.dtype != ours.dtype:
        result.conversions.setdefault((theirs.dtype, ours.dtype), []).append(key)


def _offence(theirs: Any, ours: torch.Tensor) -> str:
    if not isinstance(theirs, torch.Tensor):
        return f"{type(theirs).__name__} in the file, a tensor in the module"
    # torch 0.3 had no scalars; torch still takes its one-element vectors for them.
    if theirs.shape != ours.shape and not (ours.shape == () and theirs.shape == (1,)):
        return f"{tuple(theirs.shape)} in the file, {tuple(ours.shape)} in the module"
    if theirs.layout != ours.layout or theirs.is_quantized != ours.is_quantized:
        kind = "quantized" if theirs.is_quantized else str(theirs.layout).removeprefix("torch.")
        return f"a {kind} tensor in the file cannot be copied into this one"
    if theirs.is_complex() and not ours.is_complex():
        return f"{theirs.dtype} in the file would lose its imaginary part as {ours.dtype}"
    return ""


def _free_prefixes(module: nn.Module) -> tuple[str, ...]:
    if _overrides(module, "state_dict") or _overrides(module, "load_state_dict"):
        return ("",)
    return tuple(
        f"{path}." if path else ""
        for path, child in module.named_modules(remove_duplicate=False)
        if not _reads_plainly(child)
    )


def _reads_plainly(module: nn.Module) -> bool:
    read = type(module)._load_from_state_dict  # noqa: SLF001 - where torch has modules override it
    return read in _PLAIN_READS and not module._load_state_dict_pre_hooks  # noqa: SLF001 - torch has no public view


def _overrides(module: nn.Module, method: str) -> bool:
    return getattr(type(module), method) is not getattr(nn.Module, method)


def _takes_strict(load: Any) -> bool:
    parameters = inspect.signature(load).parameters.values()
    return any(each.name == "strict" or each.kind is each.VAR_KEYWORD for each in parameters)
