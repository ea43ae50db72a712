"""Map the keys of a file to the keys of a module, with or without the name parts that wrapper modules add."""

from __future__ import annotations

from collections import Counter, OrderedDict
from typing import TYPE_CHECKING, Any

from torch import nn

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping

_WRAPPER_NAMES = ("module", "_orig_mod")
# nn.Module.state_dict keeps the versions of the modules that wrote it in this attribute.
_METADATA = "_metadata"


def wrapped_child_name(module: nn.Module) -> str | None:
    """Return the name of the child that `module` wraps, None if `module` is not a wrapper."""
    if isinstance(module, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        return "module"
    # The class that torch.compile returns is in a package that takes seconds to import. The name of its child is enough
    # to recognize it.
    return "_orig_mod" if isinstance(getattr(module, "_orig_mod", None), nn.Module) else None


def unwrap(module: nn.Module) -> nn.Module:
    """Return the module inside of DistributedDataParallel, DataParallel and torch.compile, in any order."""
    while (name := wrapped_child_name(module)) is not None:
        module = module.get_submodule(name)
    return module


def align_keys(state: Mapping[str, Any], module: nn.Module, module_keys: Collection[str]) -> OrderedDict[str, Any]:
    """Return `state` under the keys that `module` uses.

    The keys of the file and of the module may each contain the names of wrappers. This function tries a few mappings
    and takes the one with the most matching keys; of equally good mappings, the one that changes the fewest keys. Keys
    without a match stay in the result, for the report.

    Parameters
    ----------
    state
        The content of a file. Its tensors are not touched.
    module
        The module that gives the keys. It is not a wrapper itself; its submodules may be.
    module_keys
        The keys of the module's `state_dict`.
    """
    paths = _paths_without_wrappers(module)
    plain_keys = {_plain_key(key, paths): key for key in module_keys}
    mapping = max(
        _candidate_mappings(list(state), plain_keys), key=lambda mapping: _count_matches(mapping, module_keys)
    )
    aligned = OrderedDict((mapping[key], value) for key, value in state.items())
    metadata = getattr(state, _METADATA, None)
    if metadata is not None:
        setattr(aligned, _METADATA, _align_metadata(metadata, mapping))
    return aligned


def _candidate_mappings(keys: list[str], plain_keys: Mapping[str, str]) -> Iterator[dict[str, str]]:
    """Yield mappings from the keys of a file to keys of the module; those that change the fewest keys come first."""
    yield {key: key for key in keys}
    # Remove a prefix only if all keys have it: a module may have a child with the name "module".
    prefixes = list(_common_prefixes(keys))
    for prefix in ["", *prefixes]:
        stripped = {key: key.removeprefix(prefix) for key in keys}
        yield {key: plain_keys.get(name, name) for key, name in stripped.items()}
    # The file's module may have had wrappers around its submodules: remove the names of wrappers on both sides, for the
    # keys that stay unique.
    counts = Counter(_without_wrappers(name) for name in plain_keys)
    unique = {_without_wrappers(name): key for name, key in plain_keys.items() if counts[_without_wrappers(name)] == 1}
    yield {key: unique.get(_without_wrappers(key)) or plain_keys.get(key, key) for key in keys}


def _common_prefixes(keys: list[str], prefix: str = "") -> Iterator[str]:
    for name in _WRAPPER_NAMES:
        longer = f"{prefix}{name}."
        if keys and all(key.startswith(longer) for key in keys):
            yield longer
            yield from _common_prefixes(keys, longer)


def _without_wrappers(key: str) -> str:
    return ".".join(part for part in key.split(".") if part not in _WRAPPER_NAMES)


def _count_matches(mapping: Mapping[str, str], module_keys: Collection[str]) -> int:
    targets = set(mapping.values())
    # Two keys with one target: this mapping is wrong. The first candidate changes nothing, so its targets are unique.
    return -1 if len(targets) < len(mapping) else sum(target in module_keys for target in targets)


def _paths_without_wrappers(root: nn.Module) -> dict[str, str]:
    """Return, by the path of each submodule, its path without the wrappers among its ancestors."""
    modules = dict(root.named_modules(remove_duplicate=False))
    plain = {"": ""}
    for path in filter(None, modules):
        parent, _, name = path.rpartition(".")
        is_wrapped = wrapped_child_name(modules[parent]) == name
        plain[path] = plain[parent] if is_wrapped else f"{plain[parent]}.{name}".removeprefix(".")
    return plain


def _plain_key(key: str, paths: Mapping[str, str]) -> str:
    path, _, name = key.rpartition(".")
    return f"{paths.get(path, path)}.{name}".removeprefix(".")


def _align_metadata(metadata: Mapping[str, Any], mapping: Mapping[str, str]) -> dict[str, Any]:
    """Return the versions under the new paths of their modules."""
    moved = {_module_path(key): _module_path(name) for key, name in mapping.items()}
    unchanged = {path: entry for path, entry in metadata.items() if path not in moved}
    aligned = unchanged | {new: metadata[old] for old, new in moved.items() if old in metadata}
    # A state that was loaded with load_state_dict(assign=True) and then saved contains this entry. With it, torch would
    # put the tensors of the file in place of the parameters that an optimizer holds.
    return {
        path: {name: value for name, value in entry.items() if name != "assign_to_params_buffers"}
        for path, entry in aligned.items()
    }


def _module_path(key: str) -> str:
    return key.rpartition(".")[0]
