"""Load on all ranks: all or nothing, shards of an index, shards of DTensors, the same values on every rank."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

import weightferry
from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, failed_alike, values
from weightferry.errors import LoadError, PlanMismatch
from weightferry.loading.options import LoadOptions

STATE = {
    name: torch.rand(shape, generator=torch.Generator().manual_seed(len(name) + len(shape)))
    for name, shape in {"0.weight": (16, 8), "0.bias": (16,), "2.weight": (4, 16), "2.bias": (4,)}.items()
}
EXPECTED = {name: tensor.tolist() for name, tensor in STATE.items()}


def sharded(
    names: tuple[str, str] = ("model-00001-of-00002.safetensors", "other name.safetensors"),
) -> dict[str, bytes]:
    """Return the files of the state in two shards, with their index."""
    named = {key: names[key.startswith("2")] for key in STATE}
    parts = {name: save({key: STATE[key] for key in STATE if named[key] == name}) for name in names}
    return {**parts, "model.safetensors.index.json": json.dumps({"weight_map": named}).encode(), "README.md": b"x"}


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", {"good.ckpt": jobs.saved(STATE)})
    nodes.hub.add_repo("org/shards", {"sub/" + name: content for name, content in sharded().items()})
    return nodes


@pytest.mark.parametrize("collect_in", [None, "links"])
def test_an_index_comes_with_its_shards(model: Nodes, collect_in: str | None) -> None:
    into = model.place / collect_in if collect_in else None
    path = "org/shards/sub/model.safetensors.index.json"
    gots, again = model.tries(*[partial(jobs.load, {"model": path}, jobs.only_model, into)] * 2)
    assert values(gots) == values(again) == [{"model": EXPECTED}] * 4
    big = sum(len(content) for name, content in sharded().items() if name.endswith(".safetensors"))
    assert big <= model.hub.content_bytes() <= big + 3000
    assert not any("README" in request.path for request in model.hub.requests)


def test_a_folder_as_a_loadable(model: Nodes) -> None:
    (gots,) = model.tries(partial(jobs.load, {"model": "org/shards/sub/"}, jobs.only_model, model.place / "links"))
    assert values(gots) == [{"model": EXPECTED}] * 4


def test_an_index_that_names_nonsense(model: Nodes) -> None:
    contents = [b"not json", b'{"weight_map": {"a": "../x"}}', b'{"weight_map": {"a": "absent"}}']
    name = "model.safetensors.index.json"
    model.hub.add_repo("org/bad", {f"{number}/{name}": content for number, content in enumerate(contents)})
    calls = [partial(jobs.load, {"model": f"org/bad/{n}/{name}"}, jobs.only_model) for n in range(len(contents))]
    good = partial(jobs.load, {"model": "org/model/good.ckpt"}, jobs.only_model)
    for gots, after in model.cases(*((call, good) for call in calls)):
        failed_alike(gots, weightferry.CollectError, "resolve", {0})
        assert values(after) == [{"model": EXPECTED}] * 4


def two_models() -> dict[str, Any]:
    return {"first": jobs.network(), "second": jobs.network()}


def load_and_look(paths: dict[str, str]) -> tuple[str, bool]:
    """Load; return the text of the error, and whether the modules are unchanged."""
    loadables = two_models()
    before = {name: jobs._plain(module.state_dict()) for name, module in loadables.items()}
    pretrainer = weightferry.Pretrainer(None, loadables, paths)
    pretrainer.collect_files()
    try:
        pretrainer.load_collected()
    except LoadError as error:
        text = str(error)
    after = {name: jobs._plain(module.state_dict()) for name, module in loadables.items()}
    return text, before == after


def test_a_mismatch_on_one_rank_prevents_writing_on_all_ranks(model: Nodes) -> None:
    model.hub.add_repo("org/bad", {"bad.ckpt": jobs.saved({**STATE, "2.bias": torch.ones(5)})})
    good = {"first": "org/model/good.ckpt", "second": "org/model/good.ckpt"}
    bad = partial(load_and_look, {**good, "second": "org/bad/bad.ckpt"})
    (gots,) = model.tries(partial(jobs.by_rank, {2: bad}, partial(load_and_look, good)))
    for text, unchanged in values(gots):
        assert "2.bias" in text
        assert "rank 2" in text
        assert unchanged


def test_allow_globals_must_be_the_same_on_all_ranks(model: Nodes) -> None:
    call = partial(jobs.load, {"model": "org/model/good.ckpt"}, jobs.only_model)
    other = partial(call, options={"model": LoadOptions(allow_globals=("collections.Counter",))})
    gots, alike = model.tries(partial(jobs.by_rank, {3: other}, call), other)
    failed_alike(gots, PlanMismatch, "load", {0}, "allow_globals of 'model'", "rank 3", "collections.Counter")
    assert values(alike) == [{"model": EXPECTED}] * 4


def test_ranks_with_different_values_are_named(model: Nodes) -> None:
    other = {**STATE, "2.bias": STATE["2.bias"] + 1}
    model.hub.add_repo("org/other", {"good.ckpt": jobs.saved(other)})
    call = partial(jobs.load, {"model": "org/model/good.ckpt"}, jobs.only_model, verify="digest")
    odd = partial(jobs.load, {"model": "org/other/good.ckpt"}, jobs.only_model, verify="digest")
    same, gots = model.tries(call, partial(jobs.by_rank, {1: odd}, call))
    assert values(same) == [{"model": EXPECTED}] * 4
    failed_alike(gots, LoadError, "verify", {0}, "'model' is not the same on all ranks", "'2.bias'", "on rank 1")


def test_rank_specific_loadables_are_not_compared(model: Nodes) -> None:
    model.hub.add_repo("org/other", {"good.ckpt": jobs.saved({**STATE, "2.bias": STATE["2.bias"] + 1})})
    options = {"model": LoadOptions(rank_specific=True)}
    call = partial(jobs.load, {"model": "org/model/good.ckpt"}, jobs.only_model, verify="digest", options=options)
    odd = partial(jobs.load, {"model": "org/other/good.ckpt"}, jobs.only_model, verify="digest", options=options)
    (gots,) = model.tries(partial(jobs.by_rank, {1: odd}, call))
    assert len(values(gots)) == 4


ROWS, WIDTH = 16384, 1024  # of each of two matrices, 134 MB together: the kernel maps 2 MiB at a time


def load_split(meta: bool, kind: str) -> tuple[float, bool]:
    """Load into a module split over all ranks; return the fraction of the file that this rank read, and success."""
    from torch import nn
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import DTensor, distribute_tensor
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    from weightferry.loading import hooks, modules

    mesh = init_device_mesh("cpu", (4,))
    with torch.device("meta"):
        module = nn.Sequential(nn.Linear(WIDTH, ROWS, bias=False), nn.Linear(ROWS, WIDTH))
    if not meta:
        module.to_empty(device="cpu")
    if kind == "fsdp2":
        for child in module:
            fully_shard(child, mesh=mesh)
        fully_shard(module, mesh=mesh)
    else:
        parallelize_module(module, mesh, {"0": ColwiseParallel(), "1": RowwiseParallel()})
    pretrainer = weightferry.Pretrainer(None, {"model": module}, {"model": "org/split/model.safetensors"})
    (path,) = pretrainer.collect_files().values()
    before = [id(each) for each in module.parameters()]
    read = []

    def copy_and_measure(*args: Any, **options: Any) -> Any:
        missing = modules.copy_into(*args, **options)
        read.append(resident(path))
        return missing

    vars(hooks)["copy_into"] = copy_and_measure
    pretrainer.load_collected(verify="digest")
    expected = load_file(path)
    correct = meta or before == [id(each) for each in module.parameters()]
    for key, tensor in module.state_dict().items():
        if isinstance(tensor, DTensor):
            assert tensor.to_local().numel() < tensor.numel() or kind != "fsdp2", key
            # This rank's part alone: the other ranks check theirs.
            part = distribute_tensor(expected[key], mesh, tensor.placements, src_data_rank=None)
            correct &= torch.equal(tensor.to_local(), part.to_local())
        else:
            correct &= torch.equal(tensor, expected[key])
    return read[0] / path.stat().st_size, correct


def resident(path: Path) -> int:
    """Return the bytes of a mapped file that are resident in this process."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    starts = [number for number, line in enumerate(lines) if line.endswith(str(path.resolve()))]
    return sum(
        int(line.split()[1]) * 1024 for start in starts for line in lines[start : start + 25] if line.startswith("Rss:")
    )


def test_each_rank_reads_its_own_shard(nodes: Nodes) -> None:
    """With parameters in memory and on the meta device; one job, since the parallel modules of torch load slowly."""
    generator = torch.Generator().manual_seed(0)
    state = {
        "0.weight": torch.rand(ROWS, WIDTH, generator=generator),
        "1.weight": torch.rand(WIDTH, ROWS, generator=generator),
        "1.bias": torch.rand(WIDTH, generator=generator),
    }
    nodes.hub.add_repo("org/split", {"model.safetensors": save(state)})
    cases = [(meta, kind) for kind in ("fsdp2", "tensor parallel") for meta in (False, True)]
    by_case = nodes.tries(*(partial(load_split, meta, kind) for meta, kind in cases))
    for (meta, kind), gots in zip(cases, by_case, strict=True):
        for read, correct in values(gots):
            assert correct, (kind, meta)
            # Shards of rows share pages with the neighbouring shards.
            assert 0.2 < read <= (0.3 if kind == "fsdp2" else 1.0), (kind, meta)
