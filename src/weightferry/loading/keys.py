"""Names of parameters: what wrappers put into them, and how names in a file find names in a module."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_WRAPPER_NAMES = ("module", "_orig_mod")
# Where nn.Module.state_dict keeps the versions of the modules that wrote it.
_METADATA = "_metadata"


def wrapped_name(module: nn.Module) -> str | None:
    """Return the name under which `module` holds what it wraps, None if it is no wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    # The class that torch.compile returns lives in a package that takes seconds to import; its child's name tells it.
    return "_orig_mod" if isinstance(getattr(module, "_orig_mod", None), nn.Module) else None


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside of DistributedDataParallel, DataParallel and torch.compile, in any order."""
    while (name := wrapped_name(module)) is not None:
        module = module.get_submodule(name)
    return module


def align(state: Mapping[str, Any], module: nn.Module, wanted: Collection[str]) -> OrderedDict[str, Any]:
    """Return `state` under the names that `module` uses.

    Files and modules may each have the names of wrappers in their keys, or not. Of a few ways to read the file's keys
    the one by which most fit is taken; if several do as well, the one that changes least. Keys that fit nowhere stay,
    for the report.

    Parameters
    ----------
    state
        What a file holds; its tensors are not touched.
    module
        Whose names are used, itself no wrapper; modules in it may be.
    wanted
        The keys of the module's `state_dict`.
    """
    paths = _paths_without_wrappers(module)
    plain = {_plain_key(key, paths): key for key in wanted}
    names = max(_readings(list(state), plain), key=lambda names: _fitting(names, wanted))
    aligned = OrderedDict((names[key], value) for key, value in state.items())
    metadata = getattr(state, _METADATA, None)
    if metadata is not None:
        setattr(aligned, _METADATA, _aligned_metadata(metadata, names))
    return aligned


def _readings(keys: list[str], plain: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield ways to map a file's keys to names of the module, those that change less first."""
    yield {key: key for key in keys}
    # A prefix goes only if all have it: a module may have a child that is really named "module".
    prefixes = list(_common_prefixes(keys))
    for prefix in ["", *prefixes]:
        stripped = {key: key.removeprefix(prefix) for key in keys}
        yield {key: plain.get(name, name) for key, name in stripped.items()}
    # Wrappers deeper in the file's module: their names are taken out of both, where that leaves no doubt.
    bare = Counter(_without_wrappers(name) for name in plain)
    unique = {_without_wrappers(name): key for name, key in plain.items() if bare[_without_wrappers(name)] == 1}
    yield {key: unique.get(_without_wrappers(key)) or plain.get(key, key) for key in keys}


def _common_prefixes(keys: list[str], prefix: str = "") -> Iterator[str]:
    for name in _WRAPPER_NAMES:
        longer = f"{prefix}{name}."
        if keys and all(key.startswith(longer) for key in keys):
            yield longer
            yield from _common_prefixes(keys, longer)


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPER_NAMES)


def _fitting(names: Mapping[str, str], wanted: Collection[str]) -> int:
    targets = set(names.values())
    # Two keys on one name: this is not how the file was made. The first reading, which changes nothing, never does so.
    return -1 if len(targets) < len(names) else sum(target in wanted for target in targets)


def _paths_without_wrappers(root: nn.Module) -> dict[str, str]:
    """Map each submodule's path to the path it would have if none of its ancestors were a wrapper."""
    modules = dict(root.named_modules(remove_duplicate=False))
    plain = {"": ""}
    for path in filter(None, modules):
        parent, _, name = path.rpartition(".")
        inside = wrapped_name(modules[parent]) == name
        plain[path] = plain[parent] if inside else f"{plain[parent]}.{name}".removeprefix(".")
    return plain


def _plain_key(key: str, paths: Mapping[str, str]) -> str:
    path, _, name = key.rpartition(".")
    return f"{paths.get(path, path)}.{name}".removeprefix(".")


def _aligned_metadata(metadata: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    """Return the versions under the paths that the modules they belong to now have."""
    moved = {_owner(key): _owner(name) for key, name in names.items()}
    stayed = {path: entry for path, entry in metadata.items() if path not in moved}
    aligned = stayed | {new: metadata[old] for old, new in moved.items() if old in metadata}
    # A state that once went through load_state_dict(assign=True) and was saved again carries this order with it.
    # Obeyed, it would put the file's tensors in place of the parameters that an optimizer holds.
    return {
        path: {name: value for name, value in entry.items() if name != "assign_to_params_buffers"}
        for path, entry in aligned.items()
    }


def _owner(key: str) -> str:
    return key.rpartition(".")[0]
