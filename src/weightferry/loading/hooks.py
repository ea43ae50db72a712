"""Hooks that load a file into the types of torch, sentencepiece and tokenizers."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch

from weightferry.errors import CollectError, LoadError
from weightferry.loading.keys import unwrap
from weightferry.loading.modules import ModuleFit, compare_with_module, copy_into
from weightferry.loading.options import DEFAULT_OPTIONS, LoadOptions, rename_keys
from weightferry.loading.readers import read_state

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

PathLike: TypeAlias = str | os.PathLike[str]
Commit: TypeAlias = Callable[[], None]

logger = logging.getLogger(__name__)

_MAX_NAMES_SHOWN = 20
_MAX_NAMES_COMPARED = 2000  # the comparison of more names takes seconds
# SpeechBrain writes this in place of the weak reference that an old CyclicLR holds, since it cannot be pickled.
_WEAKREF_MARKER = "WEAKREF"


def transfer_module(module: nn.Module, path: PathLike, options: LoadOptions = DEFAULT_OPTIONS) -> None:
    """Copy the tensors with matching keys from a file into a module; log one warning for missing and unexpected keys.

    The module, and the one that was saved, may each be wrapped in DistributedDataParallel, DataParallel or
    torch.compile. Parameters and buffers stay the same objects on the same devices, and tied ones stay tied; values are
    converted to their dtypes. Tensors on the meta device are replaced by tensors with memory. Of DTensors (FSDP2,
    tensor parallel) each rank reads its own shard.

    Raises
    ------
    LoadError
        Shapes differ (the text lists all of them), no key matches, or the file holds no mapping of tensors. Nothing is
        written then, with one exception: a submodule that overrides how it loads its state fails in its own code.
    """
    prepare_transfer(module, path, options)()


def prepare_transfer(module: nn.Module, path: PathLike, options: LoadOptions = DEFAULT_OPTIONS) -> Commit:
    """Check everything that `transfer_module` checks; return the function that writes."""
    if options.strict:
        return prepare_load(module, path, options)
    fit = _fit_file(module, path, options)

    def commit() -> None:
        missing, unexpected = copy_into(fit, strict=False, device=options.device)
        if fit.custom_prefixes and fit.module_state and set(missing) >= set(fit.module_state):
            raise _no_match_error(fit, path)
        _log_conversions(fit, path)
        kind = type(fit.module).__name__
        if missing:
            logger.warning(
                "%s: %d of the %d keys of %s are not in the file and keep their values: %s",
                *(path, len(missing), len(fit.module_state), kind, _shorten(_with_suggestions(missing, unexpected))),
            )
        if unexpected:
            logger.warning(
                "%s: %d of the %d keys in the file are not in %s and are ignored: %s",
                *(path, len(unexpected), len(fit.file_state), kind, _shorten(unexpected)),
            )

    return commit


def load_module(
    module: nn.Module, path: PathLike, end_of_epoch: bool = False, options: LoadOptions = DEFAULT_OPTIONS
) -> None:
    """Copy a file into a module as `transfer_module` does; missing and unexpected keys raise an error.

    Raises
    ------
    LoadError
        As `transfer_module`, and if the keys of the file and of the module are not the same.
    """
    del end_of_epoch
    prepare_load(module, path, options)()


def prepare_load(module: nn.Module, path: PathLike, options: LoadOptions = DEFAULT_OPTIONS) -> Commit:
    """Check everything that `load_module` checks; return the function that writes."""
    fit = _fit_file(module, path, options)
    missing, unexpected = fit.without_custom(fit.missing), fit.without_custom(fit.unexpected)
    if missing or unexpected:
        raise LoadError(
            f"{path}: the keys in the file differ from those of {type(fit.module).__name__}; nothing was written. "
            f"Missing ({len(missing)}): {_shorten(_with_suggestions(missing, unexpected))}. Unexpected "
            f"({len(unexpected)}): {_shorten(unexpected)}. Map names with LoadOptions(rename=...), or load without "
            "strict to copy only the keys that match",
            subject=str(path),
        )

    def commit() -> None:
        copy_into(fit, strict=True, device=options.device)
        _log_conversions(fit, path)

    return commit


def load_state(obj: Any, path: PathLike, end_of_epoch: bool = False) -> None:
    """Pass the state in a file to `obj.load_state_dict`: for optimizers, schedulers and gradient scalers.

    Raises
    ------
    LoadError
        The file holds no mapping, or a mapping without any key of `obj`, or `obj` rejects it.
    """
    del end_of_epoch
    prepare_state(obj, path)()


def prepare_state(obj: Any, path: PathLike, options: LoadOptions = DEFAULT_OPTIONS) -> Commit:
    """Check everything that `load_state` checks; return the function that passes the state to the object."""
    state = _read_mapping(path, options, mapped=False)
    _check_state(obj, state, path)
    return lambda: _load_state_dict(obj, state, path)


def transfer_state(obj: Any, path: PathLike) -> None:
    """Do the same as `load_state`, for objects of any class that has ``load_state_dict``."""
    prepare_state(obj, path)()


def load_cyclic_lr(obj: Any, path: PathLike, end_of_epoch: bool = False) -> None:
    """Load a CyclicLR, also from files in which SpeechBrain replaced the scale function by a marker."""
    del end_of_epoch
    prepare_cyclic_lr(obj, path)()


def prepare_cyclic_lr(obj: Any, path: PathLike, options: LoadOptions = DEFAULT_OPTIONS) -> Commit:
    """Check everything that `load_cyclic_lr` checks; return the function that passes the state to the scheduler."""
    state = dict(_read_mapping(path, options, mapped=False))
    if state.get("_scale_fn_ref") == _WEAKREF_MARKER:
        # The scheduler keeps its own scale function. torch requires the key below, which these old files lack.
        del state["_scale_fn_ref"]
        state.setdefault("_scale_fn_custom", None)
    _check_state(obj, state, path)
    return lambda: _load_state_dict(obj, state, path)


def load_sentencepiece(obj: Any, path: PathLike) -> None:
    """Load a sentencepiece model.

    Raises
    ------
    LoadError
        The file holds no sentencepiece model. `obj` keeps its model.
    """
    prepare_sentencepiece(obj, path)()


def prepare_sentencepiece(obj: Any, path: PathLike, options: LoadOptions = DEFAULT_OPTIONS) -> Commit:
    """Check everything that `load_sentencepiece` checks; return the function that loads."""
    from sentencepiece import SentencePieceProcessor  # obj is one, so the package is already imported

    del options
    try:
        content = Path(path).read_bytes()
        # Test with another processor: one that fails to load loses the model that it had.
        SentencePieceProcessor().LoadFromSerializedProto(content)
    except (OSError, RuntimeError) as error:
        text = (
            f"cannot load a sentencepiece model from {path}: {error}. The file is damaged or truncated, or holds "
            "something else"
        )
        raise LoadError(text, subject=str(path)) from error
    return lambda: obj.LoadFromSerializedProto(content)


def load_tokenizer(obj: Any, path: PathLike) -> None:
    """Load a ``tokenizers.Tokenizer`` from its JSON file.

    Raises
    ------
    LoadError
        The file holds no tokenizer. `obj` does not change.
    """
    prepare_tokenizer(obj, path)()


def prepare_tokenizer(obj: Any, path: PathLike, options: LoadOptions = DEFAULT_OPTIONS) -> Commit:
    """Check everything that `load_tokenizer` checks; return the function that loads."""
    from tokenizers import Tokenizer  # obj is one, so the package is already imported

    del options
    try:
        state = Tokenizer.from_str(Path(path).read_text()).__getstate__()
    except Exception as error:
        text = (
            f"cannot load a tokenizer from {path}: {type(error).__name__}: {error}. The file is damaged or truncated, "
            "or is not a tokenizer.json"
        )
        raise LoadError(text, subject=str(path)) from error
    return lambda: obj.__setstate__(state)


PREPARE_BY_HOOK: dict[Callable[..., Any], Callable[[Any, PathLike, LoadOptions], Commit]] = {
    transfer_module: prepare_transfer,
    load_module: prepare_load,
    load_state: prepare_state,
    transfer_state: prepare_state,
    load_cyclic_lr: prepare_cyclic_lr,
    load_sentencepiece: prepare_sentencepiece,
    load_tokenizer: prepare_tokenizer,
}
"""By hook, the function that checks everything that can be checked before anything is written."""


def _fit_file(module: nn.Module, path: PathLike, options: LoadOptions) -> ModuleFit:
    """Compare a file with a module; raise an error, before anything is written, if the file cannot be loaded."""
    state = _read_mapping(path, options, mapped=True)
    fit = compare_with_module(_rename(state, options, path), unwrap(module))
    kind = type(fit.module).__name__
    if fit.no_key_matches:
        raise _no_match_error(fit, path)
    if fit.meta_without_value:
        raise LoadError(
            f"{path}: {len(fit.meta_without_value)} tensors of {kind} are on the meta device and are not in the file; "
            f"nothing was written: {_shorten(_with_suggestions(fit.meta_without_value, fit.unexpected))}. Initialize "
            "them on a device before loading, or map the names with LoadOptions(rename=...)",
            subject=str(path),
        )
    if fit.mismatches:
        listed = "\n  ".join(fit.mismatches)
        raise LoadError(
            f"{path}: {len(fit.mismatches)} tensors do not fit into {kind}; nothing was written:\n  {listed}\n"
            f"Make {kind} with the configuration of this file, or load another file",
            subject=str(path),
        )
    return fit


def _rename(state: Mapping[str, Any], options: LoadOptions, path: PathLike) -> Mapping[str, Any]:
    """Return `state` under its new keys, with the module versions that torch attaches to a state."""
    if options.rename is None:
        return state
    result = OrderedDict(rename_keys(state, options.rename, str(path)))
    if (metadata := getattr(state, "_metadata", None)) is not None:
        result._metadata = metadata  # type: ignore[attr-defined]  # noqa: SLF001 - torch keeps the versions here
    return result


def _read_mapping(path: PathLike, options: LoadOptions, *, mapped: bool) -> Mapping[str, Any]:
    state = read_state(path, mapped=mapped, allow_globals=options.allow_globals)
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise LoadError(
            f"{path} holds a {kind}, not a mapping from names to values; save a state_dict", subject=str(path)
        )
    odd = [key for key in state if not isinstance(key, str)]
    if odd:
        raise LoadError(
            f"{path} has keys that are not strings: {_shorten([repr(key) for key in odd])}; save a state_dict",
            subject=str(path),
        )
    return state


def _check_state(obj: Any, state: Mapping[str, Any], path: PathLike) -> None:
    kind = type(obj).__name__
    own_keys = obj.state_dict().keys() if hasattr(obj, "state_dict") else set()
    # A scheduler accepts any mapping: it would keep the weights of a model as attributes.
    if own_keys and not own_keys & state.keys():
        raise LoadError(
            f"{path} holds no state of {kind}: the file has the keys {_shorten(list(state))}; {kind} has "
            f"{_shorten(list(own_keys))}. Check that this path belongs to this object",
            subject=str(path),
        )


def _load_state_dict(obj: Any, state: Mapping[str, Any], path: PathLike) -> None:
    try:
        obj.load_state_dict(state)
    except CollectError:
        raise
    except Exception as error:
        raise LoadError(
            f"{path}: {type(obj).__name__} rejects the state in this file ({type(error).__name__}: {error}); "
            f"its keys are {_shorten(list(state))}",
            subject=str(path),
        ) from error


def _no_match_error(fit: ModuleFit, path: PathLike) -> LoadError:
    kind = type(fit.module).__name__
    lines = [
        f"{path}: none of the {len(fit.file_state)} keys in the file is a key of {kind}; nothing was written.",
        f"  The file has: {_shorten(list(fit.file_state), 5)}",
        f"  {kind} has: {_shorten(list(fit.module_state), 5)}",
    ]
    nested = [key for key, value in fit.file_state.items() if isinstance(value, Mapping) and value]
    if nested:
        sizes = ", ".join(f"{key!r} (a mapping of {len(fit.file_state[key])})" for key in nested[:5])
        lines.append(
            f"  The weights may be inside of {sizes}. Load them with a custom hook: "
            f"`lambda module, path: module.load_state_dict(read_state(path)[{nested[0]!r}])`, "
            "with `read_state` from weightferry.loading.readers"
        )
    else:
        lines.append("  If only the names differ, map them with LoadOptions(rename=...)")
    return LoadError("\n".join(lines), subject=str(path))


def _log_conversions(fit: ModuleFit, path: PathLike) -> None:
    on_meta = [name for name, buffer in fit.module.named_buffers() if buffer.is_meta]
    if on_meta:
        logger.warning(
            "%s: %d buffers of %s are not in the file and stay on the meta device; initialize them before use: %s",
            *(path, len(on_meta), type(fit.module).__name__, _shorten(on_meta)),
        )
    for (source, target), keys in fit.conversions.items():
        lossy = not torch.can_cast(source, target)
        level = logging.WARNING if lossy else logging.INFO
        note = ", which cannot hold every value" if lossy else ""
        logger.log(
            level,
            "%s: %d tensors converted from %s to %s%s: %s",
            *(path, len(keys), source, target, note, _shorten(keys)),
        )


def _with_suggestions(missing: Collection[str], unexpected: Collection[str]) -> list[str]:
    """Append to each of the first missing keys the closest key of the file."""
    keys, result = list(missing), []
    for key in keys[:_MAX_NAMES_SHOWN]:
        close = get_close_matches(key, unexpected, n=1, cutoff=0.6) if len(unexpected) <= _MAX_NAMES_COMPARED else []
        result.append(f"{key} (the file has {close[0]})" if close else key)
    return result + keys[_MAX_NAMES_SHOWN:]


def _shorten(names: Collection[str], limit: int = _MAX_NAMES_SHOWN) -> str:
    shown = ", ".join(list(names)[:limit]) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
