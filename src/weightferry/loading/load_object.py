"""Load one file into one object, with the hook for its type."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from torch import nn

from weightferry.errors import CollectError, LoadError, NoHook, redact
from weightferry.loading.hook_registry import (
    DEFAULT_LOAD_HOOKS,
    DEFAULT_TRANSFER_HOOKS,
    LOADER_MARK,
    TRANSFER_MARK,
    Hook,
    fallback_hook,
    find_hook,
)
from weightferry.loading.hooks import PREPARE_BY_HOOK
from weightferry.loading.keys import unwrap
from weightferry.loading.options import DEFAULT_OPTIONS, LoadOptions

if TYPE_CHECKING:
    import os
    from collections.abc import Callable

    PathLike: TypeAlias = str | os.PathLike[str]

T = TypeVar("T")


def load_object(
    name: str, obj: Any, path: PathLike, custom_hook: Hook | None = None, options: LoadOptions = DEFAULT_OPTIONS
) -> None:
    """Load a file into an object: with its custom hook, else its type's transfer hook, else its type's load hook.

    Parameters
    ----------
    name
        The loadable's name, for errors.
    obj
        Any object. For a wrapped module (DistributedDataParallel, DataParallel, torch.compile), the hook belongs to the
        class of the inner module and receives the inner module. A custom hook receives `obj` unchanged.
    path
        A local file. The hook receives it unchanged.
    custom_hook
        Called as ``custom_hook(obj, path)``.

    Raises
    ------
    NoHook
        There is no hook for the type of this object.
    LoadError
        The hook failed; the text names the loadable and the file. A `CollectError` of the hook is raised unchanged.
    """
    prepare_object(name, obj, path, custom_hook, options)()


def prepare_object(
    name: str, obj: Any, path: PathLike, custom_hook: Hook | None = None, options: LoadOptions = DEFAULT_OPTIONS
) -> Callable[[], None]:
    """Check everything that `load_object` can check before it writes; return the function that writes.

    For hooks that are not part of this package, this only finds the hook: their checks run when they are called.

    Raises
    ------
    LoadError
        As for `load_object`.
    """
    hook, target, extra_args = _resolve_hook(name, obj, custom_hook)
    prepare = PREPARE_BY_HOOK.get(hook)
    if prepare is None:
        if options.for_modules:
            raise LoadError(
                f"{name!r} is loaded by {hook!r}, which supports no options: remove them ({options})", subject=name
            )
        return lambda: _wrap_errors(name, path, lambda: hook(target, path, *extra_args))
    if options.for_modules and not isinstance(target, nn.Module):
        raise LoadError(
            f"{name!r} is not a module, and these options are only for modules: remove them ({options})", subject=name
        )
    commit = _wrap_errors(name, path, lambda: prepare(target, path, options))
    return lambda: _wrap_errors(name, path, commit)


def check_loadable(name: str, obj: Any, custom_hook: Hook | None = None) -> None:
    """Check that `load_object` would find a hook. The hook is not called.

    Raises
    ------
    NoHook
        There is none.
    """
    _resolve_hook(name, obj, custom_hook)


def _wrap_errors(name: str, path: PathLike, work: Callable[[], T]) -> T:
    """Call `work`; raise errors of other classes as a `LoadError` with the loadable and the file."""
    try:
        return work()
    except CollectError:
        raise
    except Exception as error:
        text = f"loading {name!r} from {path} failed: {type(error).__name__}: {error}"
        raise LoadError(redact(text), subject=str(path)) from error


def _resolve_hook(name: str, obj: Any, custom_hook: Hook | None) -> tuple[Hook, Any, tuple[bool, ...]]:
    """Return the hook, its first argument, and the arguments after the path: `end_of_epoch` for a load hook."""
    if custom_hook is not None:
        if not callable(custom_hook):
            raise NoHook(
                f"the custom hook of {name!r} is a {type(custom_hook).__name__}, which cannot be called; "
                "give a function hook(obj, path)"
            )
        return custom_hook, obj, ()
    target = _hook_target(obj)
    if (transfer := find_hook(target, DEFAULT_TRANSFER_HOOKS, TRANSFER_MARK)) is not None:
        return transfer, target, ()
    if (load := find_hook(target, DEFAULT_LOAD_HOOKS, LOADER_MARK)) is not None:
        return load, target, (False,)
    if (fallback := fallback_hook(target)) is not None:
        return fallback, target, ()
    raise NoHook(_no_hook_text(name, obj))


def _hook_target(obj: Any) -> Any:
    registered = type(obj) in DEFAULT_TRANSFER_HOOKS or type(obj) in DEFAULT_LOAD_HOOKS
    return unwrap(obj) if isinstance(obj, nn.Module) and not registered else obj


def _no_hook_text(name: str, obj: Any) -> str:
    kind = type(obj)
    return (
        f"no hook can load {name!r}, an object of type {kind.__module__}.{kind.__qualname__}. "
        "Add one in one of three ways:\n"
        f"  for this object: Pretrainer(..., custom_hooks={{{name!r}: hook}}), called as hook(obj, path)\n"
        f"  in its class: @register_checkpoint_hooks on {kind.__qualname__}, and @mark_as_transfer on the method "
        "(self, path) that loads it\n"
        f"  for its type: weightferry.DEFAULT_TRANSFER_HOOKS[{kind.__qualname__}] = hook"
    )
