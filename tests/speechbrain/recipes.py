"""What the ranks run: the ways in which recipes of SpeechBrain collect and load."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import speechbrain as sb
import torch
from speechbrain.inference.interfaces import Pretrained
from speechbrain.utils import fetching
from speechbrain.utils.distributed import if_main_process, main_process_only, run_on_main, run_once_per_node

import weightferry
from tests.multiprocess.jobs import rank
from weightferry import Pretrainer
from weightferry.cluster import barrier


def collect_on_main(pretrainer: Pretrainer, arguments: list[Any] | None = None) -> Any:
    return run_on_main(pretrainer.collect_files, arguments)


def collect_on_main_from(pretrainer: Pretrainer) -> Any:
    pretrainer.paths.clear()
    return run_on_main(pretrainer.collect_files, kwargs={"default_source": "org/model"})


def collect_on_main_with(pretrainer: Pretrainer) -> Any:
    source = fetching.FetchSource(fetching.FetchFrom.HUGGING_FACE, "org/model")
    pretrainer.paths.clear()
    arguments = [source, fetching.LocalStrategy.COPY, fetching.FetchConfig(revision="main")]
    return run_on_main(pretrainer.collect_files, arguments)


def collect_if_main(pretrainer: Pretrainer) -> Any:
    paths = None
    if if_main_process():
        paths = pretrainer.collect_files()
    return paths


def collect_if_main_and(pretrainer: Pretrainer) -> Any:
    if sb.utils.distributed.if_main_process() and pretrainer.loadables:
        for _ in range(1):
            return pretrainer.collect_files(None, False)
    return None


def collect_inside_of_a_decorator(pretrainer: Pretrainer) -> Any:
    @main_process_only  # type: ignore[untyped-decorator]
    def prepare() -> Any:
        return pretrainer.collect_files()

    return prepare()


def collect_once_per_node(pretrainer: Pretrainer) -> Any:
    return run_once_per_node(pretrainer.collect_files)


def collect_everywhere(pretrainer: Pretrainer, arguments: Sequence[Any] = ()) -> Any:
    return pretrainer.collect_files(*arguments)


def collect_on_main_in_a_group(pretrainer: Pretrainer) -> Any:
    return run_on_main(pretrainer.collect_files, kwargs={"group": torch.distributed.group.WORLD})


def collect_on_main_and_read(pretrainer: Pretrainer) -> bytes:
    return Path(run_on_main(pretrainer.collect_files)["model"]).read_bytes()


def node() -> str:
    """The name of the folder of this node."""
    return Path(os.environ["WEIGHTFERRY_CACHE_DIR"]).name


def make(collect_in: Path | None) -> Pretrainer:
    torch.manual_seed(rank())  # other values on each rank, so that loading shows
    path = "org/model/model.ckpt"
    folder = collect_in / node() if collect_in else None
    return Pretrainer(folder, {"model": torch.nn.Linear(4, 4)}, {"model": path})


def recipe(collect: Callable[[Pretrainer], Any], collect_in: Path | None) -> tuple[Any, list[Any], Pretrainer]:
    """Collect and load; what `collect` returned, the values, and the pretrainer without its loadables."""
    pretrainer = make(collect_in)
    returned = collect(pretrainer)
    pretrainer.load_collected()
    values = pretrainer.loadables["model"].weight.tolist()
    pretrainer.loadables.clear()
    return returned, values, pretrainer


def twice(collect: Callable[[Pretrainer], Any], collect_in: Path | None) -> tuple[list[Any], str]:
    """Collect and load one pretrainer twice; the values of both times, and where they came from."""
    pretrainer, loaded = make(collect_in), []
    for _ in range(2):
        collect(pretrainer)
        torch.nn.init.zeros_(pretrainer.loadables["model"].weight)
        pretrainer.load_collected()
        loaded.append(pretrainer.loadables["model"].weight.tolist())
    assert pretrainer.report is not None
    return loaded, str(pretrainer.report.manifest["source"])


def load_on_main(collect_in: Path | None) -> Any:
    """Collect and load inside of the guard, as some recipes do; the values."""
    pretrainer = make(collect_in)
    run_on_main(pretrainer.collect_files)
    run_on_main(pretrainer.load_collected)
    return pretrainer.loadables["model"].weight.tolist()


def interface(source: str, savedir: Path | None, prepare: Callable[[str, Path], Any] | None = None) -> Any:
    """Make an interface of SpeechBrain from its hyperparameters; the values of its model."""
    torch.manual_seed(rank())
    folder = savedir / node() if savedir else None
    if prepare is not None and folder is not None:
        prepare(source, folder)
    made = Pretrained.from_hparams(source, savedir=folder, run_opts={"device": "cpu"})
    assert isinstance(made.hparams.pretrainer, Pretrainer)
    return made.mods.model.weight.tolist()


def stage_to(source: str, folder: Path) -> None:
    """Bring all files of the source into the folder of this node."""
    weightferry.stage(source, to=folder)


def recipe_and_store(collect: Callable[[Pretrainer], Any], collect_in: Path) -> tuple[list[Any], list[bytes]]:
    """Collect and load; the values, and all that this rank wrote to the job's store."""
    written, put = [], vars(barrier)["put"]

    def record(store: Any, key: str, value: bytes) -> None:
        written.append(value)
        put(store, key, value)

    vars(barrier)["put"] = record
    _, values, _ = recipe(collect, collect_in)
    return values, written
