"""How a file gets into objects of the types that torch and sentencepiece define."""

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
from weightferry.loading.modules import ModuleFit, copy_into, fit
from weightferry.loading.options import DEFAULT, LoadOptions, renamed
from weightferry.loading.readers import read_state

if TYPE_CHECKING:
    from collections.abc import Collection

    from torch import nn

PathLike: TypeAlias = str | os.PathLike[str]
Commit: TypeAlias = Callable[[], None]

logger = logging.getLogger(__name__)

_NAMES_SHOWN = 20
_NAMES_COMPARED = 2000  # more would take seconds
# What SpeechBrain writes where a CyclicLR of its time held a weak reference, which cannot be pickled.
_WEAKREF_MARKER = "WEAKREF"


def transfer_module(module: nn.Module, path: PathLike, options: LoadOptions = DEFAULT) -> None:
    """Copy what fits from a file into a module; what does not is said in one warning per kind.

    The module may be wrapped in DistributedDataParallel, DataParallel or torch.compile, and so may the one have been
    that was saved. Parameters and buffers stay the objects they are, on their devices, tied ones tied; values are
    converted to their dtypes. Tensors on the meta device are replaced by ones with memory. Of DTensors (FSDP2, tensor
    parallel) each rank reads the part that it owns.

    Raises
    ------
    LoadError
        Shapes differ (all of them are listed), no key fits, or the file holds no mapping of tensors. Nothing is
        written then, except where a submodule that overrides how it reads its state fails by itself.
    """
    prepare_transfer(module, path, options)()


def prepare_transfer(module: nn.Module, path: PathLike, options: LoadOptions = DEFAULT) -> Commit:
    """Check all that `transfer_module` checks, and return what writes."""
    if options.strict:
        return prepare_load(module, path, options)
    fitted = _fit_file(module, path, options)

    def commit() -> None:
        missing, unexpected = copy_into(fitted, strict=False, device=options.device)
        if fitted.free and fitted.wanted and set(missing) >= set(fitted.wanted):
            raise _none_fits(fitted, path)
        _say_more(fitted, path)
        kind = type(fitted.module).__name__
        if missing:
            logger.warning(
                "%s: %d of the %d keys of %s are not in the file and keep their values: %s",
                *(path, len(missing), len(fitted.wanted), kind, _some(_hinted(missing, unexpected))),
            )
        if unexpected:
            logger.warning(
                "%s: %s has no use for %d of the %d keys in the file: %s",
                *(path, kind, len(unexpected), len(fitted.given), _some(unexpected)),
            )

    return commit


def load_module(module: nn.Module, path: PathLike, end_of_epoch: bool = False, options: LoadOptions = DEFAULT) -> None:
    """Copy a file into a module as `transfer_module` does; that a key is missing or left over is an error.

    Raises
    ------
    LoadError
        As `transfer_module`, and if the keys of file and module are not the same.
    """
    del end_of_epoch
    prepare_load(module, path, options)()


def prepare_load(module: nn.Module, path: PathLike, options: LoadOptions = DEFAULT) -> Commit:
    """Check all that `load_module` checks, and return what writes."""
    fitted = _fit_file(module, path, options)
    missing, unexpected = fitted.certain(fitted.missing), fitted.certain(fitted.unexpected)
    if missing or unexpected:
        raise LoadError(
            f"{path} does not have the keys of {type(fitted.module).__name__}; nothing was written. Missing "
            f"({len(missing)}): {_some(_hinted(missing, unexpected))}. Left over ({len(unexpected)}): "
            f"{_some(unexpected)}",
            subject=str(path),
        )

    def commit() -> None:
        copy_into(fitted, strict=True, device=options.device)
        _say_more(fitted, path)

    return commit


def load_state(obj: Any, path: PathLike, end_of_epoch: bool = False) -> None:
    """Give a file's state to `obj.load_state_dict`: optimizers, schedulers, gradient scalers.

    Raises
    ------
    LoadError
        The file holds no mapping, or one that was not written by an object of this kind, or the object refuses it.
    """
    del end_of_epoch
    prepare_state(obj, path)()


def prepare_state(obj: Any, path: PathLike, options: LoadOptions = DEFAULT) -> Commit:
    """Check all that `load_state` checks, and return what gives the state to the object."""
    state = _read_mapping(path, options, mapped=False)
    _check_state(obj, state, path)
    return lambda: _give_state(obj, state, path)


def transfer_state(obj: Any, path: PathLike) -> None:
    """Do as `load_state`, for objects of any class that has ``load_state_dict``."""
    prepare_state(obj, path)()


def load_cyclic_lr(obj: Any, path: PathLike, end_of_epoch: bool = False) -> None:
    """Load a CyclicLR, also from files in which SpeechBrain has replaced the scale function by a marker."""
    del end_of_epoch
    prepare_cyclic_lr(obj, path)()


def prepare_cyclic_lr(obj: Any, path: PathLike, options: LoadOptions = DEFAULT) -> Commit:
    """Check all that `load_cyclic_lr` checks, and return what gives the state to the scheduler."""
    state = dict(_read_mapping(path, options, mapped=False))
    if state.get("_scale_fn_ref") == _WEAKREF_MARKER:
        # The scheduler's own scale function stays; torch asks for the key below, and files of that time lack it.
        del state["_scale_fn_ref"]
        state.setdefault("_scale_fn_custom", None)
    _check_state(obj, state, path)
    return lambda: _give_state(obj, state, path)


def load_sentencepiece(obj: Any, path: PathLike) -> None:
    """Load a sentencepiece model.

    Raises
    ------
    LoadError
        The file holds no model; `obj` keeps the one it has.
    """
    prepare_sentencepiece(obj, path)()


def prepare_sentencepiece(obj: Any, path: PathLike, options: LoadOptions = DEFAULT) -> Commit:
    """Check all that `load_sentencepiece` checks, and return what loads."""
    from sentencepiece import SentencePieceProcessor  # obj is one, so this imports nothing

    del options
    try:
        content = Path(path).read_bytes()
        # A processor that fails to load is left without its former model.
        SentencePieceProcessor().LoadFromSerializedProto(content)
    except (OSError, RuntimeError) as error:
        text = f"{path} holds no sentencepiece model, or is truncated or damaged: {error}"
        raise LoadError(text, subject=str(path)) from error
    return lambda: obj.LoadFromSerializedProto(content)


def load_tokenizer(obj: Any, path: PathLike) -> None:
    """Load a ``tokenizers.Tokenizer`` from its JSON file.

    Raises
    ------
    LoadError
        The file holds no tokenizer; `obj` stays what it is.
    """
    prepare_tokenizer(obj, path)()


def prepare_tokenizer(obj: Any, path: PathLike, options: LoadOptions = DEFAULT) -> Commit:
    """Check all that `load_tokenizer` checks, and return what loads."""
    from tokenizers import Tokenizer  # obj is one, so this imports nothing

    del options
    try:
        state = Tokenizer.from_str(Path(path).read_text()).__getstate__()
    except Exception as error:
        text = f"{path} holds no tokenizer, or is truncated or damaged: {type(error).__name__}: {error}"
        raise LoadError(text, subject=str(path)) from error
    return lambda: obj.__setstate__(state)


PREPARES: dict[Callable[..., Any], Callable[[Any, PathLike, LoadOptions], Commit]] = {
    transfer_module: prepare_transfer,
    load_module: prepare_load,
    load_state: prepare_state,
    transfer_state: prepare_state,
    load_cyclic_lr: prepare_cyclic_lr,
    load_sentencepiece: prepare_sentencepiece,
    load_tokenizer: prepare_tokenizer,
}
"""By hook, what checks all that can be checked before anything is written."""


def _fit_file(module: nn.Module, path: PathLike, options: LoadOptions) -> ModuleFit:
    """Compare a file with a module, and raise before anything is written if they do not fit."""
    state = _read_mapping(path, options, mapped=True)
    fitted = fit(_renamed(state, options, path), unwrap(module))
    kind = type(fitted.module).__name__
    if fitted.none_fits:
        raise _none_fits(fitted, path)
    if fitted.without_value:
        raise LoadError(
            f"{path}: {len(fitted.without_value)} tensors of {kind} are on the meta device and get no value from this "
            f"file; nothing was written: {_some(_hinted(fitted.without_value, fitted.unexpected))}",
            subject=str(path),
        )
    if fitted.offenders:
        listed = "\n  ".join(fitted.offenders)
        raise LoadError(
            f"{path}: {len(fitted.offenders)} tensors do not fit into {kind}; nothing was written:\n  {listed}",
            subject=str(path),
        )
    return fitted


def _renamed(state: Mapping[str, Any], options: LoadOptions, path: PathLike) -> Mapping[str, Any]:
    """Rename, and keep the versions that torch puts beside a state."""
    if options.rename is None:
        return state
    result = OrderedDict(renamed(state, options.rename, str(path)))
    if (metadata := getattr(state, "_metadata", None)) is not None:
        result._metadata = metadata  # type: ignore[attr-defined]  # noqa: SLF001 - where torch keeps it
    return result


def _read_mapping(path: PathLike, options: LoadOptions, *, mapped: bool) -> Mapping[str, Any]:
    state = read_state(path, mapped=mapped, allow_globals=options.allow_globals)
    if not isinstance(state, Mapping):
        kind = type(state).__name__
        raise LoadError(f"{path} holds a {kind}, not a mapping from names to values", subject=str(path))
    odd = [key for key in state if not isinstance(key, str)]
    if odd:
        raise LoadError(f"{path} has keys that are no names: {_some([repr(key) for key in odd])}", subject=str(path))
    return state


def _check_state(obj: Any, state: Mapping[str, Any], path: PathLike) -> None:
    kind = type(obj).__name__
    own = obj.state_dict().keys() if hasattr(obj, "state_dict") else set()
    # Schedulers take anything: they would carry a model's weights as attributes from then on.
    if own and not own & state.keys():
        raise LoadError(
            f"{path} holds no state of {kind}: its keys are {_some(list(state))}; {kind} has {_some(list(own))}",
            subject=str(path),
        )


def _give_state(obj: Any, state: Mapping[str, Any], path: PathLike) -> None:
    try:
        obj.load_state_dict(state)
    except CollectError:
        raise
    except Exception as error:
        raise LoadError(
            f"{path}: {type(obj).__name__} does not take this state ({type(error).__name__}: {error}); its keys are "
            f"{_some(list(state))}",
            subject=str(path),
        ) from error


def _none_fits(fitted: ModuleFit, path: PathLike) -> LoadError:
    kind = type(fitted.module).__name__
    lines = [
        f"{path}: none of its {len(fitted.given)} keys is one that {kind} wants; nothing was written.",
        f"  It has: {_some(list(fitted.given), 5)}",
        f"  {kind} wants: {_some(list(fitted.wanted), 5)}",
    ]
    nested = [key for key, value in fitted.given.items() if isinstance(value, Mapping) and value]
    if nested:
        sizes = ", ".join(f"{key!r} (a mapping of {len(fitted.given[key])})" for key in nested[:5])
        lines.append(
            f"  The weights may be inside of {sizes}. A custom hook can take them out: "
            f"`lambda module, path: module.load_state_dict(read_state(path)[{nested[0]!r}])`, "
            "with `read_state` from weightferry.loading.readers"
        )
    return LoadError("\n".join(lines), subject=str(path))


def _say_more(fitted: ModuleFit, path: PathLike) -> None:
    left = [name for name, buffer in fitted.module.named_buffers() if buffer.is_meta]
    if left:
        logger.warning(
            "%s: %d buffers of %s are in no file and stay on the meta device, compute them: %s",
            *(path, len(left), type(fitted.module).__name__, _some(left)),
        )
    for (theirs, ours), keys in fitted.conversions.items():
        loses = not torch.can_cast(theirs, ours)
        level = logging.WARNING if loses else logging.INFO
        note = ", which cannot hold every value" if loses else ""
        logger.log(
            level, "%s: %d tensors converted from %s to %s%s: %s", path, len(keys), theirs, ours, note, _some(keys)
        )


def _hinted(missing: Collection[str], unexpected: Collection[str]) -> list[str]:
    """Put behind the first missing keys what the file may call them."""
    shown, hinted = list(missing), []
    for key in shown[:_NAMES_SHOWN]:
        near = get_close_matches(key, unexpected, n=1, cutoff=0.6) if len(unexpected) <= _NAMES_COMPARED else []
        hinted.append(f"{key} (the file has {near[0]})" if near else key)
    return hinted + shown[_NAMES_SHOWN:]


def _some(names: Collection[str], limit: int = _NAMES_SHOWN) -> str:
    shown = ", ".join(list(names)[:limit]) or "none"
    return f"{shown} and {len(names) - limit} more" if len(names) > limit else shown
