"""Where in the user's code a collective call is made, and which guard keeps other ranks from making it."""

from __future__ import annotations

import ast
import linecache
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

_PACKAGE = __name__.partition(".")[0]
_SKIPPED = (_PACKAGE, "contextlib")
# Functions of libraries that call the user's code on some ranks only, by module and name; and what users know them by.
_GUARD_FUNCTIONS = {
    ("speechbrain.utils.distributed", "run_on_main"): "SpeechBrain's run_on_main",
    ("speechbrain.utils.distributed", "main_proc_wrapped_func"): "SpeechBrain's main_process_only",
    ("speechbrain.utils.distributed", "once_per_node_wrapped_fn"): "SpeechBrain's once_per_node",
    ("lightning_utilities.core.rank_zero", "wrapped_fn"): "Lightning's rank_zero_only",
    ("accelerate.accelerator", "_inner"): "accelerate's on_main_process or a decorator like it",
}
_IF_MAIN = "`if if_main_process():`"
_HOOKS = {"prepare_data": ("lightning", "pytorch_lightning")}
# Names in the condition of an `if`, or of a context manager, that only some ranks enter at a time.
_GUARD_CONTEXTS = {"main_process_first", "local_main_process_first", "rank_zero_first"}
_GUARD_CONDITIONS = {
    *("if_main_process", "is_main_process", "is_local_main_process", "is_world_process_zero", "is_local_process_zero"),
    *("is_global_zero", "is_rank_zero", "is_main", "is_master", "local_rank", "global_rank", "rank", "get_rank"),
}


@dataclass(frozen=True)
class CallSite:
    """A collective call in the user's code.

    Attributes
    ----------
    function : str
        Name of the called function.
    place : str
        File, line and function of the call; empty if it is unknown.
    guard : str
        What keeps other ranks from the call, as far as it is recognised; otherwise empty.
    """

    function: str
    place: str = ""
    guard: str = ""

    def __str__(self) -> str:
        at = f" at {self.place}" if self.place else ""
        return f"{self.function}(){at}" + (f" inside {self.guard}" if self.guard else "")


def caller_of_package(frame: FrameType | None = None) -> FrameType | None:
    """Return the innermost frame that is not in this package."""
    return next(_outside(frame or sys._getframe(1)), None)  # noqa: SLF001 -- the documented way to a frame


def find_call_site(function: str, frame: FrameType | None, *, with_guard: bool = True) -> CallSite:
    """Describe a call and its guard.

    Parameters
    ----------
    function
        Name of the called function.
    frame
        The frame of the caller, from `caller_of_package`. The call must not have returned.
    with_guard
        Look for the guard. This parses the file of the caller, which takes milliseconds; for calls that already wait.
    """
    if frame is None:
        return CallSite(function)
    code = frame.f_code
    place = f"{Path(code.co_filename).name}:{frame.f_lineno}"
    if code.co_name != "<module>":
        place += f" in {code.co_name}"
    if not with_guard:
        return CallSite(function, place)
    guards = (guard for one in _outside(frame) if (guard := _guard_of(one)))
    return CallSite(function, place, next(guards, ""))


def main_process_guard(frame: FrameType | None) -> str:
    """Return the guard of SpeechBrain because of which only the main process, or one rank of each node, is here.

    SpeechBrain counts the guards `run_on_main`, `main_process_only`, `run_once_per_node` and `once_per_node`. An ``if
    if_main_process():`` is found in the source of the callers.

    Parameters
    ----------
    frame
        The frame of the caller, from `caller_of_package`.

    Returns
    -------
    str
        Empty if there is no such guard.
    """
    speechbrain = sys.modules.get("speechbrain.utils.distributed")
    if speechbrain is None:
        return ""
    for counter, guard in (("MAIN_PROC_ONLY", "run_on_main"), ("NODE_ONCE_ONLY", "run_once_per_node")):
        if getattr(speechbrain, counter, 0) > 0:
            return f"SpeechBrain's {guard}"
    return _IF_MAIN if any(_is_in_if_main_process(one) for one in _outside(frame)) else ""


def _is_in_if_main_process(frame: FrameType) -> bool:
    name = "if_main_process"
    if not _uses(frame, {name}):
        return False
    return any(
        isinstance(node, ast.If) and _is_true_only_if(node.test, name) and _encloses(node.body, frame.f_lineno)
        for node in ast.walk(_parse(frame))
    )


def _is_true_only_if(test: ast.expr, name: str) -> bool:
    """Return whether a condition is a call of this function, or such a call and more."""
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return any(_is_true_only_if(part, name) for part in test.values)
    return isinstance(test, ast.Call) and name in (getattr(test.func, "id", ""), getattr(test.func, "attr", ""))


def _outside(frame: FrameType | None) -> Iterator[FrameType]:
    while frame is not None:
        if str(frame.f_globals.get("__name__", "")).partition(".")[0] not in _SKIPPED:
            yield frame
        frame = frame.f_back


def _guard_of(frame: FrameType) -> str:
    module, name = str(frame.f_globals.get("__name__", "")), frame.f_code.co_name
    if (module, name) in _GUARD_FUNCTIONS:
        return _GUARD_FUNCTIONS[module, name]
    callers = _HOOKS.get(name, ())
    if callers and any(str(f.f_globals.get("__name__", "")).split(".")[0] in callers for f in _outside(frame.f_back)):
        return f"Lightning's {name}"
    return _guard_in_source(frame)


def _guard_in_source(frame: FrameType) -> str:
    """Find a `with` or an `if` around the running line of a frame that only some ranks enter at a time."""
    guard = ""
    if not _uses(frame, _GUARD_CONTEXTS | _GUARD_CONDITIONS):
        return guard
    for node in ast.walk(_parse(frame)):  # outer statements come first, so the innermost guard wins
        if not isinstance(node, ast.With | ast.If) or not _encloses(node.body, frame.f_lineno):
            continue
        if isinstance(node, ast.With):
            found = _names(*(item.context_expr for item in node.items)) & _GUARD_CONTEXTS
            guard = next(iter(found), guard)
        elif _names(node.test) & _GUARD_CONDITIONS:
            guard = f"`if {ast.unparse(node.test)}:`"
    return guard


def _uses(frame: FrameType, names: set[str]) -> bool:
    """Return whether the code of a frame has one of these names; reads no source, which takes long."""
    code = frame.f_code
    return not names.isdisjoint((*code.co_names, *code.co_varnames, *code.co_cellvars, *code.co_freevars))


def _parse(frame: FrameType) -> ast.Module:
    """Return the tree of the file of a frame; without content if the file cannot be read."""
    try:
        return ast.parse("".join(linecache.getlines(frame.f_code.co_filename, frame.f_globals)))
    except (SyntaxError, ValueError, RecursionError):
        return ast.Module([], [])


def _encloses(body: list[ast.stmt], line: int) -> bool:
    return body[0].lineno <= line <= (body[-1].end_lineno or 0)


def _names(*expressions: ast.expr) -> set[str]:
    """Return all names, attributes and called methods in some expressions."""
    nodes = [node for expression in expressions for node in ast.walk(expression)]
    names = {node.id for node in nodes if isinstance(node, ast.Name)}
    return names | {node.attr for node in nodes if isinstance(node, ast.Attribute)}
