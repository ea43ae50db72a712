"""Stage pretrained weights on every node of a cluster and load them on every rank: once, fast, without hanging.

Each public name is imported at its first use, so that ``import weightferry`` stays fast: it loads neither torch nor the
client library of an origin.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from weightferry._version import __version__

if TYPE_CHECKING:
    from weightferry.errors import (
        AccessDenied,
        BadRequest,
        CollectError,
        Failure,
        IntegrityError,
        LeaderLost,
        LoadError,
        NoHook,
        NoSpace,
        NotDistributed,
        OriginError,
        OriginUnreachable,
        PlanMismatch,
        SourceChanged,
        SourceNotFound,
        Stalled,
        UnsafeFile,
    )
    from weightferry.loading.hook_registry import (
        DEFAULT_LOAD_HOOKS,
        DEFAULT_TRANSFER_HOOKS,
        get_default_hook,
        mark_as_loader,
        mark_as_transfer,
        register_checkpoint_hooks,
    )
    from weightferry.loading.options import LoadOptions
    from weightferry.once import run_on_leader, run_on_main
    from weightferry.pretrainer import PARAMFILE_EXT, Pretrainer
    from weightferry.settings import Settings
    from weightferry.sources import FetchFrom, FetchSource
    from weightferry.staging import stage

_NAMES_BY_MODULE = {
    "weightferry.errors": (
        "AccessDenied BadRequest CollectError Failure IntegrityError LeaderLost LoadError NoHook NoSpace "
        "NotDistributed OriginError OriginUnreachable PlanMismatch SourceChanged SourceNotFound Stalled UnsafeFile"
    ),
    "weightferry.once": "run_on_leader run_on_main",
    "weightferry.loading.options": "LoadOptions",
    "weightferry.loading.hook_registry": (
        "DEFAULT_LOAD_HOOKS DEFAULT_TRANSFER_HOOKS get_default_hook mark_as_loader mark_as_transfer "
        "register_checkpoint_hooks"
    ),
    "weightferry.pretrainer": "PARAMFILE_EXT Pretrainer",
    "weightferry.settings": "Settings",
    "weightferry.sources": "FetchFrom FetchSource",
    "weightferry.staging": "stage",
}
_MODULE_OF = {name: module for module, names in _NAMES_BY_MODULE.items() for name in names.split()}

__all__ = [
    "DEFAULT_LOAD_HOOKS",
    "DEFAULT_TRANSFER_HOOKS",
    "PARAMFILE_EXT",
    "AccessDenied",
    "BadRequest",
    "CollectError",
    "Failure",
    "FetchFrom",
    "FetchSource",
    "IntegrityError",
    "LeaderLost",
    "LoadError",
    "LoadOptions",
    "NoHook",
    "NoSpace",
    "NotDistributed",
    "OriginError",
    "OriginUnreachable",
    "PlanMismatch",
    "Pretrainer",
    "Settings",
    "SourceChanged",
    "SourceNotFound",
    "Stalled",
    "UnsafeFile",
    "__version__",
    "get_default_hook",
    "mark_as_loader",
    "mark_as_transfer",
    "register_checkpoint_hooks",
    "run_on_leader",
    "run_on_main",
    "stage",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(_MODULE_OF[name]), name)
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
