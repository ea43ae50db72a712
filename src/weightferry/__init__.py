"""Get pretrained weights onto every node of a cluster and into every rank: once, fast, and without ever hanging.

The public names are imported when they are first used, so that ``import weightferry`` costs nothing: neither torch nor
an origin's client is loaded by it.
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
    from weightferry.loading.options import LoadOptions
    from weightferry.loading.registry import (
        DEFAULT_LOAD_HOOKS,
        DEFAULT_TRANSFER_HOOKS,
        get_default_hook,
        mark_as_loader,
        mark_as_transfer,
        register_checkpoint_hooks,
    )
    from weightferry.once import run_on_leader, run_on_main
    from weightferry.pretrainer import PARAMFILE_EXT, Pretrainer
    from weightferry.settings import Settings
    from weightferry.sources import FetchFrom, FetchSource
    from weightferry.staging import stage

_HOMES = {
    "weightferry.errors": (
        "AccessDenied BadRequest CollectError Failure IntegrityError LeaderLost LoadError NoHook NoSpace "
        "NotDistributed OriginError OriginUnreachable PlanMismatch SourceChanged SourceNotFound Stalled UnsafeFile"
    ),
    "weightferry.once": "run_on_leader run_on_main",
    "weightferry.loading.options": "LoadOptions",
    "weightferry.loading.registry": (
        "DEFAULT_LOAD_HOOKS DEFAULT_TRANSFER_HOOKS get_default_hook mark_as_loader mark_as_transfer "
        "register_checkpoint_hooks"
    ),
    "weightferry.pretrainer": "PARAMFILE_EXT Pretrainer",
    "weightferry.settings": "Settings",
    "weightferry.sources": "FetchFrom FetchSource",
    "weightferry.staging": "stage",
}
_HOME = {name: module for module, names in _HOMES.items() for name in names.split()}

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
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    found = globals()[name] = getattr(import_module(_HOME[name]), name)
    return found


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
