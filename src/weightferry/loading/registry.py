"""Which hook loads which type, with SpeechBrain's interface and meaning.

Hooks are plain functions in plain dicts; whoever wants another one for a type puts it there. A transfer hook is called
as ``hook(obj, path)``, a load hook as ``hook(obj, path, end_of_epoch)``.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from weightferry.loading.hooks import (
    load_cyclic_lr,
    load_module,
    load_sentencepiece,
    load_state,
    load_tokenizer,
    transfer_module,
    transfer_state,
)

PARAMFILE_EXT = ".ckpt"

Hook = Callable[..., Any]
_Method = TypeVar("_Method", bound=Callable[..., Any])
_Class = TypeVar("_Class", bound=type)

# The attributes by which SpeechBrain marks methods: a class marked with one's decorators works with the other.
LOADER_MARK = "_speechbrain_loader"
TRANSFER_MARK = "_speechbrain_transfer"

DEFAULT_LOAD_HOOKS: dict[type, Hook] = {
    torch.nn.Module: load_module,
    torch.optim.Optimizer: load_state,
    torch.optim.lr_scheduler.LRScheduler: load_state,
    torch.optim.lr_scheduler.ReduceLROnPlateau: load_state,
    torch.optim.lr_scheduler.CyclicLR: load_cyclic_lr,
    torch.amp.grad_scaler.GradScaler: load_state,
}
DEFAULT_TRANSFER_HOOKS: dict[type, Hook] = {torch.nn.Module: transfer_module}

try:
    from sentencepiece import SentencePieceProcessor
except ImportError:
    pass
else:
    DEFAULT_TRANSFER_HOOKS[SentencePieceProcessor] = load_sentencepiece


def get_default_hook(obj: object, default_hooks: dict[type, Hook]) -> Hook | None:
    """Return the hook of the nearest class in the method resolution order of `obj`, None if no class has one."""
    return next((default_hooks[cls] for cls in type(obj).__mro__ if cls in default_hooks), None)


def mark_as_loader(method: _Method) -> _Method:
    """Mark a method as the one that loads its class, called as ``method(self, path, end_of_epoch)``.

    The class needs `register_checkpoint_hooks`.

    Raises
    ------
    TypeError
        The method cannot be called so.
    """
    _check_signature(method, "loader", "(self, path, end_of_epoch)", (object(), Path("path"), True))
    setattr(method, LOADER_MARK, True)
    return method


def mark_as_transfer(method: _Method) -> _Method:
    """Mark a method as the one that transfers parameters into its class, called as ``method(self, path)``.

    The class needs `register_checkpoint_hooks`. A transfer hook is preferred to a loader.

    Raises
    ------
    TypeError
        The method cannot be called so.
    """
    _check_signature(method, "transfer hook", "(self, path)", (object(), Path("path")))
    setattr(method, TRANSFER_MARK, True)
    return method


def register_checkpoint_hooks(cls: _Class, save_on_main_only: bool = True) -> _Class:
    """Register the marked methods of a class as its hooks; a class decorator.

    Parameters
    ----------
    cls
        The class; methods that it inherits do not count.
    save_on_main_only
        Taken since SpeechBrain's decorator has it, and not used: nothing is saved here.

    Returns
    -------
    type
        `cls`.
    """
    del save_on_main_only
    for mark, hooks in ((LOADER_MARK, DEFAULT_LOAD_HOOKS), (TRANSFER_MARK, DEFAULT_TRANSFER_HOOKS)):
        method = marked_method(cls, mark)
        if method is not None:
            hooks[cls] = method
    return cls


def marked_method(cls: type, mark: str) -> Hook | None:
    """Return the last method that `cls` itself defines and that carries `mark`, None without one."""
    found = None
    for method in vars(cls).values():
        # Not only "has the attribute": there are objects that have every attribute.
        if callable(method) and getattr(method, mark, None) is True:
            found = method
    return found


def find_hook(obj: object, hooks: dict[type, Hook], mark: str) -> Hook | None:
    """Return the hook of the nearest class of `obj` that is in `hooks`, or has a method with `mark`.

    The mark alone counts, too: a class that SpeechBrain's decorator has registered shows nothing else. What was put
    into SpeechBrain's own table by hand counts for its class, but for those of torch, which both know.
    """
    theirs = _speechbrains(mark)
    for cls in type(obj).__mro__:
        hook = hooks.get(cls) or marked_method(cls, mark) or theirs.get(cls)
        if hook is not None:
            return hook
    return None


def fallback(obj: object) -> Hook | None:
    """Return what loads an object of a class that nobody has registered: a tokenizer, or what takes a state dict."""
    # Not imported for it: whoever has such an object has imported it.
    tokenizers = sys.modules.get("tokenizers")
    if tokenizers is not None and isinstance(obj, tokenizers.Tokenizer):
        return load_tokenizer
    return transfer_state if callable(getattr(type(obj), "load_state_dict", None)) else None


def _speechbrains(mark: str) -> dict[type, Hook]:
    module = sys.modules.get("speechbrain.utils.checkpoints")
    name = "DEFAULT_TRANSFER_HOOKS" if mark == TRANSFER_MARK else "DEFAULT_LOAD_HOOKS"
    hooks: dict[type, Hook] = getattr(module, name, {})
    return hooks


def _check_signature(method: Hook, what: str, signature: str, arguments: tuple[object, ...]) -> None:
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"a {what} must have the signature {signature}: {error}") from error
