"""Registry of hooks: which function loads which type, with the interface and behaviour of SpeechBrain.

Hooks are plain functions in plain dicts: add an entry to a dict to register a hook for a type. A transfer hook is
called as ``hook(obj, path)``, a load hook as ``hook(obj, path, end_of_epoch)``.
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

# SpeechBrain marks methods with these attributes. So a class with the decorators of one package works with the other.
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
    """Return the hook of the first class in the method resolution order of `obj` that has one, else None."""
    return next((default_hooks[cls] for cls in type(obj).__mro__ if cls in default_hooks), None)


def mark_as_loader(method: _Method) -> _Method:
    """Mark a method as the load hook of its class, called as ``method(self, path, end_of_epoch)``.

    The class needs `register_checkpoint_hooks`.

    Raises
    ------
    TypeError
        The method does not accept these arguments.
    """
    _check_signature(method, "loader", "(self, path, end_of_epoch)", (object(), Path("path"), True))
    setattr(method, LOADER_MARK, True)
    return method


def mark_as_transfer(method: _Method) -> _Method:
    """Mark a method as the transfer hook of its class, called as ``method(self, path)``.

    The class needs `register_checkpoint_hooks`. A transfer hook takes precedence over a load hook.

    Raises
    ------
    TypeError
        The method does not accept these arguments.
    """
    _check_signature(method, "transfer hook", "(self, path)", (object(), Path("path")))
    setattr(method, TRANSFER_MARK, True)
    return method


def register_checkpoint_hooks(cls: _Class, save_on_main_only: bool = True) -> _Class:
    """Register the marked methods of a class as its hooks; a class decorator.

    Parameters
    ----------
    cls
        The class. Methods that it inherits are not registered.
    save_on_main_only
        Accepted because SpeechBrain's decorator has it. It has no effect: this package saves nothing.

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
    """Return the last method that `cls` itself defines and that has `mark`, else None."""
    found = None
    for method in vars(cls).values():
        # The value of the mark must be True: some objects (mocks) have every attribute.
        if callable(method) and getattr(method, mark, None) is True:
            found = method
    return found


def find_hook(obj: object, hooks: dict[type, Hook], mark: str) -> Hook | None:
    """Return the hook of the first class in the method resolution order of `obj` that has one, else None.

    A class has a hook if it is in `hooks`, or defines a method with `mark`, or is in SpeechBrain's own table. The mark
    alone is enough: a class with SpeechBrain's decorator is not in `hooks`. Entries of SpeechBrain's table for torch's
    classes have no effect, since `hooks` has these classes too.
    """
    speechbrain_hooks = _speechbrain_hooks(mark)
    for cls in type(obj).__mro__:
        hook = hooks.get(cls) or marked_method(cls, mark) or speechbrain_hooks.get(cls)
        if hook is not None:
            return hook
    return None


def fallback_hook(obj: object) -> Hook | None:
    """Return the hook for an object of an unregistered class: a tokenizer, or an object with ``load_state_dict``."""
    # Do not import tokenizers: a process with a Tokenizer object has already imported it.
    tokenizers = sys.modules.get("tokenizers")
    if tokenizers is not None and isinstance(obj, tokenizers.Tokenizer):
        return load_tokenizer
    return transfer_state if callable(getattr(type(obj), "load_state_dict", None)) else None


def _speechbrain_hooks(mark: str) -> dict[type, Hook]:
    module = sys.modules.get("speechbrain.utils.checkpoints")
    name = "DEFAULT_TRANSFER_HOOKS" if mark == TRANSFER_MARK else "DEFAULT_LOAD_HOOKS"
    hooks: dict[type, Hook] = getattr(module, name, {})
    return hooks


def _check_signature(method: Hook, role: str, signature: str, arguments: tuple[object, ...]) -> None:
    try:
        inspect.signature(method).bind(*arguments)
    except TypeError as error:
        raise TypeError(f"a {role} must have the signature {signature}: {error}") from error
