"""Where a collective call stands in the user's code, and which guard is around it."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weightferry.cluster.call_site import CallSite, caller_of_package, find_call_site, main_process_guard

CALL = "call()"


@pytest.fixture
def called_from(tmp_path: Path) -> Callable[..., CallSite]:
    """Run a script of the user's, and describe the call in it."""

    def run(text: str, name: str = "__main__", **variables: Any) -> CallSite:
        file, found = tmp_path / "train.py", list[CallSite]()
        file.write_text(text)

        def call() -> None:
            found.append(find_call_site("stage", caller_of_package(sys._getframe(1))))

        exec(compile(text, str(file), "exec"), {"__name__": name, "call": call, **variables})
        return found[0]

    return run


@pytest.mark.parametrize(
    ("text", "guard"),
    [
        ("call()", ""),
        ("if rank == 0:\n    call()", "`if rank == 0:`"),
        ("if rank:\n    pass\nelse:\n    call()", ""),
        ("if not os:\n    pass\ncall()", ""),
        ("if True:\n    call()", ""),
        ("if accelerator.is_main_process:\n    call()", "`if accelerator.is_main_process:`"),
        ("if dist.get_rank() == 0:\n    x = 1\n    call()", "`if dist.get_rank() == 0:`"),
        ("with accelerator.main_process_first():\n    call()", "main_process_first"),
        ("with args.main_process_first(desc='map'):\n    call()", "main_process_first"),
        ("with a.local_main_process_first():\n    if 1:\n        call()", "local_main_process_first"),
    ],
)
def test_guards_in_the_source(called_from: Callable[..., CallSite], text: str, guard: str) -> None:
    class Anything:
        is_main_process = True

        def __getattr__(self, name: str) -> Any:
            return self if name != "is_main_process" else True

        def __call__(self, *_: Any, **__: Any) -> Any:
            return self

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = None  # type: ignore[assignment]

    anything = Anything()
    site = called_from(text, rank=0, accelerator=anything, dist=anything, args=anything, a=anything, os=True)
    line = text[: text.index(CALL)].count("\n") + 1
    assert (site.function, site.place, site.guard) == ("stage", f"train.py:{line}", guard)


def test_the_function_around_a_call_is_named(called_from: Callable[..., CallSite]) -> None:
    site = called_from("def main():\n    call()\nmain()")
    assert str(site) == "stage() at train.py:2 in main"


@pytest.mark.parametrize(
    ("module", "function", "guard"),
    [
        ("speechbrain.utils.distributed", "run_on_main", "SpeechBrain's run_on_main"),
        ("speechbrain.utils.distributed", "main_proc_wrapped_func", "SpeechBrain's main_process_only"),
        ("lightning_utilities.core.rank_zero", "wrapped_fn", "Lightning's rank_zero_only"),
        ("accelerate.accelerator", "_inner", "accelerate's on_main_process or a decorator like it"),
        ("somebody.else", "wrapped_fn", ""),
    ],
)
def test_guards_on_the_stack(called_from: Callable[..., CallSite], module: str, function: str, guard: str) -> None:
    library = types.ModuleType(module)
    exec(f"def {function}(f):\n    return f()", library.__dict__)
    site = called_from("guard(lambda: call())", guard=library.__dict__[function])
    assert site.guard == guard


def test_a_hook_of_lightning(called_from: Callable[..., CallSite]) -> None:
    lightning = types.ModuleType("lightning.pytorch.trainer")
    exec("def run(f):\n    f()", lightning.__dict__)
    text = "def prepare_data():\n    call()\nrun(prepare_data)"
    assert called_from(text, run=lightning.__dict__["run"]).guard == "Lightning's prepare_data"
    assert called_from(text, run=lambda f: f()).guard == ""


def test_only_sources_that_name_a_guard_are_read(called_from: Callable[..., CallSite], tmp_path: Path) -> None:
    """The source of a large library, which may be on the stack, takes seconds to parse on a busy machine."""
    library, read = types.ModuleType("library"), list[str]()

    class Loader:
        def get_source(self, name: str) -> str:
            read.append(name)
            return ""

    for name, text in {"plain": "def run(f):\n    return f()", "guards": "def run(f, rank=0):\n    return f()"}.items():
        library.__dict__.update(__name__=name, __loader__=Loader())
        exec(compile(text, str(tmp_path / f"{name}.not-there"), "exec"), library.__dict__)
        called_from("run(lambda: call())", run=library.__dict__["run"])
    assert read == ["guards"]


def test_a_call_without_a_file() -> None:
    namespace: dict[str, Any] = {"get": lambda: find_call_site("stage", sys._getframe(1)), "__name__": "notebook"}
    exec("if rank == 0:\n    site = get()", {**namespace, "rank": 0}, namespace)
    assert namespace["site"].guard == ""
    assert find_call_site("stage", None) == CallSite("stage")


class TestMainProcessGuard:
    """Where only the main process is, in code that has imported SpeechBrain."""

    IF_MAIN = "`if if_main_process():`"

    @pytest.fixture
    def guard(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
        """Run a script of the user's that imports SpeechBrain, and return the guard around the call in it."""
        distributed: Any = types.ModuleType("speechbrain.utils.distributed")
        distributed.MAIN_PROC_ONLY = distributed.NODE_ONCE_ONLY = 0
        distributed.if_main_process = lambda: True
        monkeypatch.setitem(sys.modules, distributed.__name__, distributed)
        self.distributed = distributed

        def run(text: str) -> str:
            file, found = tmp_path / "train.py", list[str]()
            file.write_text(text)
            names = {"sb": distributed, "yes": True, "if_main_process": distributed.if_main_process}
            call = lambda: found.append(main_process_guard(caller_of_package(sys._getframe(1))))  # noqa: E731
            exec(compile(text, str(file), "exec"), {"__name__": "__main__", "call": call, **names})
            return found[0]

        return run

    @pytest.mark.parametrize(
        "text",
        [
            "if if_main_process():\n    call()",
            "if sb.if_main_process():\n    call()",
            "if yes and if_main_process():\n    call()",
            "if if_main_process():\n    for _ in (1,):\n        call()",
            "def collect():\n    call()\ndef main():\n    if sb.if_main_process():\n        collect()\nmain()",
            "main = if_main_process\ndef run(if_main_process):\n    if if_main_process():\n        call()\nrun(main)",
        ],
    )
    def test_an_if_around_the_call(self, guard: Callable[[str], str], text: str) -> None:
        assert guard(text) == self.IF_MAIN

    @pytest.mark.parametrize(
        "text",
        [
            "call()",
            "if if_main_process():\n    pass\ncall()",
            "if not if_main_process():\n    pass\nelse:\n    call()",
            "if yes or if_main_process():\n    call()",
            "if if_main_process:\n    call()",
            "if yes:\n    call()\nif_main_process()",
        ],
    )
    def test_no_such_if_around_the_call(self, guard: Callable[[str], str], text: str) -> None:
        assert guard(text) == ""

    def test_the_counters_of_speechbrain(self, guard: Callable[[str], str]) -> None:
        for counter, name in (("MAIN_PROC_ONLY", "run_on_main"), ("NODE_ONCE_ONLY", "run_once_per_node")):
            assert guard("call()") == ""
            setattr(self.distributed, counter, 1)
            assert guard("call()") == f"SpeechBrain's {name}"
            setattr(self.distributed, counter, 0)

    def test_without_speechbrain(self, guard: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delitem(sys.modules, "speechbrain.utils.distributed")
        assert guard("if if_main_process():\n    call()") == ""
