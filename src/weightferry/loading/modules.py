"""Compare a state with a module before anything is written, then copy it into the module's parameters and buffers."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from weightferry.loading.device_copy import CudaDeviceCopier, can_copy_directly, copy_to_device
from weightferry.loading.dtensor import is_dtensor, local_shard
from weightferry.loading.keys import align_keys

if TYPE_CHECKING:
    from collections.abc import Mapping

# Methods of torch that require the shapes of the module. A method that overrides them may resize, rename or fill in.
_STANDARD_LOAD_METHODS = frozenset(cls._load_from_state_dict for cls in (nn.Module, nn.BatchNorm1d, nn.InstanceNorm1d))
# Files from before torch 0.4.1 lack these counters, and torch fills them in.
_OPTIONAL_SUFFIX = "num_batches_tracked"


@dataclass(frozen=True)
class ModuleFit:
    """The result of comparing a file with a module; nothing is written yet.

    Attributes
    ----------
    module
        The module, without wrappers.
    module_state
        The `state_dict` of the module.
    file_state
        The tensors of the file, under the keys of the module.
    missing, unexpected
        Keys that only the module has, and keys that only the file has.
    mismatches
        One line for each tensor that cannot be copied to the tensor with its key.
    conversions
        By (dtype in the file, dtype in the module), the keys whose values are converted.
    custom_prefixes
        Key prefixes of the submodules that load their state with code of their own. Their keys and shapes cannot be
        checked before this code runs.
    """

    module: nn.Module
    module_state: Mapping[str, Any]
    file_state: dict[str, Any]
    missing: list[str]
    unexpected: list[str]
    custom_prefixes: tuple[str, ...]
    mismatches: list[str] = field(default_factory=list)
    conversions: dict[tuple[torch.dtype, torch.dtype], list[str]] = field(default_factory=dict)

    @property
    def meta_without_value(self) -> list[str]:
        """Keys of the module's tensors that are on the meta device and are not in the file."""
        return [
            key
            for key, tensor in self.module_state.items()
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and key not in self.file_state
        ]

    @property
    def no_key_matches(self) -> bool:
        """Whether the module has a state, and the file has none of its keys."""
        return (
            bool(self.module_state)
            and not self.custom_prefixes
            and not any(key in self.module_state for key in self.file_state)
        )

    def without_custom(self, keys: list[str]) -> list[str]:
        """Return those of `keys` that do not belong to a submodule with loading code of its own."""
        return [key for key in keys if not key.startswith(self.custom_prefixes)]


def compare_with_module(state: Mapping[str, Any], module: nn.Module) -> ModuleFit:
    """Compare `state` with `module`: keys, shapes and dtypes. Neither is changed, and no values are read."""
    module_state = _module_state(module)
    file_state = align_keys(state, module, module_state)
    _fill_in_tied(file_state, module_state)
    fit = ModuleFit(
        module=module,
        module_state=module_state,
        file_state=file_state,
        missing=[key for key in module_state if key not in file_state and not key.endswith(_OPTIONAL_SUFFIX)],
        unexpected=[key for key in file_state if key not in module_state],
        custom_prefixes=_custom_prefixes(module),
    )
    for key in file_state.keys() & module_state.keys():
        _compare_tensor(key, fit)
    fit.mismatches.sort()
    return fit


def copy_into(fit: ModuleFit, *, strict: bool, device: str | None = None) -> tuple[list[str], list[str]]:
    """Copy the tensors of the file into the module's parameters and buffers, which stay the same objects.

    Tensors on the meta device are first replaced by new ones on `device`; tied tensors stay tied. For DTensors, each
    rank copies only its own shard.

    Returns
    -------
    tuple[list[str], list[str]]
        Missing and unexpected keys, as the module itself reports them. A class may override `load_state_dict` with a
        method that takes only the state, or that returns nothing; then both are empty.
    """
    module_state = _module_state(fit.module) if _materialize(fit, device or "cpu") else fit.module_state
    for key, tensor in module_state.items():
        if is_dtensor(tensor) and key in fit.file_state:
            fit.file_state[key] = local_shard(fit.file_state[key], tensor)
    _copy_to_gpus(fit, module_state)
    load: Any = fit.module.load_state_dict
    result = load(fit.file_state, strict=strict) if _takes_strict(load) else load(fit.file_state)
    return ([], []) if result is None else (list(result.missing_keys), list(result.unexpected_keys))


def _copy_to_gpus(fit: ModuleFit, module_state: Mapping[str, Any]) -> None:
    """Copy the tensors that need no conversion to their GPU; the module then copies each of them onto itself."""
    by_device: dict[torch.device, list[str]] = {}
    for key in fit.without_custom([key for key in fit.file_state if key in module_state]):
        if can_copy_directly(fit.file_state[key], module_state[key]):
            by_device.setdefault(module_state[key].device, []).append(key)
    for device, keys in by_device.items():
        copy_to_device(((fit.file_state[key], module_state[key]) for key in keys), CudaDeviceCopier(device))
        fit.file_state.update((key, module_state[key].detach()) for key in keys)


def _materialize(fit: ModuleFit, device: str) -> bool:
    """Replace tensors on the meta device that the file has values for; return whether any was replaced."""
    replaced: dict[int, torch.Tensor] = {}
    with_value = {id(tensor) for key, tensor in fit.module_state.items() if key in fit.file_state}
    for module in fit.module.modules():
        both: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)  # noqa: SLF001 - setattr calls hooks
        for tensors in both:
            for name, tensor in tensors.items():
                if tensor is not None and tensor.is_meta and id(tensor) in with_value:
                    tensors[name] = replaced.setdefault(id(tensor), _empty_like(tensor, device))
    return bool(replaced)


def _empty_like(tensor: torch.Tensor, device: str) -> torch.Tensor:
    empty = torch.empty_like(tensor, device=device, requires_grad=False)
    if not isinstance(tensor, nn.Parameter):
        return empty
    parameter = nn.Parameter(empty, requires_grad=tensor.requires_grad)
    parameter.__dict__.update(tensor.__dict__)  # attributes that libraries set on parameters
    return parameter


def _module_state(module: nn.Module) -> Mapping[str, Any]:
    if _overrides(module, "state_dict"):
        return dict(module.state_dict())
    return dict(module.state_dict(keep_vars=True))


def _fill_in_tied(file_state: dict[str, Any], module_state: Mapping[str, Any]) -> None:
    """Add a tied tensor under all of its keys: a safetensors file holds it under one key only."""
    tied: dict[int, list[str]] = {}
    for key, tensor in module_state.items():
        tied.setdefault(id(tensor), []).append(key)
    for keys in tied.values():
        in_file = [key for key in keys if key in file_state]
        file_state.update({key: file_state[in_file[0]] for key in keys if in_file and key not in file_state})


def _compare_tensor(key: str, fit: ModuleFit) -> None:
    source, target = fit.file_state[key], fit.module_state[key]
    if not isinstance(target, torch.Tensor) or is_lazy(target) or not fit.without_custom([key]):
        return
    mismatch = _mismatch(source, target)
    if mismatch:
        fit.mismatches.append(f"{key}: {mismatch}")
    elif source.dtype != target.dtype:
        fit.conversions.setdefault((source.dtype, target.dtype), []).append(key)


def _mismatch(source: Any, target: torch.Tensor) -> str:
    if not isinstance(source, torch.Tensor):
        return f"{type(source).__name__} in the file, a tensor in the module"
    # torch 0.3 had no scalars: torch still accepts its one-element vectors for them.
    if source.shape != target.shape and not (target.shape == () and source.shape == (1,)):
        return f"{tuple(source.shape)} in the file, {tuple(target.shape)} in the module"
    if source.layout != target.layout or source.is_quantized != target.is_quantized:
        kind = "quantized" if source.is_quantized else str(source.layout).removeprefix("torch.")
        return f"a {kind} tensor in the file cannot be copied into the tensor of the module"
    if source.is_complex() and not target.is_complex():
        return f"{source.dtype} in the file would lose its imaginary part as {target.dtype}"
    return ""


def _custom_prefixes(module: nn.Module) -> tuple[str, ...]:
    if _overrides(module, "state_dict") or _overrides(module, "load_state_dict"):
        return ("",)
    return tuple(
        f"{path}." if path else ""
        for path, child in module.named_modules(remove_duplicate=False)
        if not _loads_by_standard_code(child)
    )


def _loads_by_standard_code(module: nn.Module) -> bool:
    load = type(module)._load_from_state_dict  # noqa: SLF001 - torch lets modules override this method
    return load in _STANDARD_LOAD_METHODS and not module._load_state_dict_pre_hooks  # noqa: SLF001 - no public view


def _overrides(module: nn.Module, method: str) -> bool:
    return getattr(type(module), method) is not getattr(nn.Module, method)


def _takes_strict(load: Any) -> bool:
    parameters = inspect.signature(load).parameters.values()
    return any(each.name == "strict" or each.kind is each.VAR_KEYWORD for each in parameters)
