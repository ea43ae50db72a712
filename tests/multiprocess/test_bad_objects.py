"""Complete files that cannot be loaded, and invalid names: the same error on every rank."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from safetensors.torch import save

from tests.multiprocess import jobs
from tests.multiprocess.nodes import Nodes, check_cache, failed_alike, values
from tests.unit.loading.malformed import RunsCommand
from weightferry.errors import BadRequest, CollectError, LoadError, NoHook, UnsafeFile

ALL = {0, 1, 2, 3}
WEIGHTS = {
    "0.weight": torch.ones(16, 8),
    "0.bias": torch.ones(16),
    "2.weight": torch.ones(4, 16),
    "2.bias": torch.ones(4),
}


@pytest.fixture
def model(nodes: Nodes) -> Nodes:
    nodes.hub.add_repo("org/model", {"good.ckpt": jobs.saved(WEIGHTS)})
    return nodes


def check_next_call(nodes: Nodes, after: list[jobs.Got], case: int | None = None) -> None:
    expected = {"model": {name: value.tolist() for name, value in WEIGHTS.items()}}
    assert values(after) == [expected] * 4
    for rank in (0, 2):
        check_cache(nodes.cache(rank, case))


GOOD = partial(jobs.load, {"model": "org/model/good.ckpt"}, jobs.only_model)


def test_a_damaged_checkpoint(model: Nodes) -> None:
    contents = {
        "torch": jobs.saved(WEIGHTS)[:-700],
        "short": jobs.saved(WEIGHTS)[:300],
        "safetensors": save(WEIGHTS)[:-10],
        "empty": b"",
        "html": b"<html>not found</html>",
    }
    model.hub.add_repo("org/bad", {f"{name}/model.ckpt": content for name, content in contents.items()})
    calls = [partial(jobs.load, {"model": f"org/bad/{name}/model.ckpt"}, jobs.only_model) for name in contents]
    for case, (gots, after) in enumerate(model.cases(*((call, GOOD) for call in calls))):
        failed_alike(gots, LoadError, "load", ALL, "model.ckpt")
        check_next_call(model, after, case)


def test_a_pickle_that_wants_to_run_a_command(model: Nodes) -> None:
    marker = model.place / "marker"
    model.hub.add_repo("org/bad", {"model.ckpt": jobs.saved({"0.weight": RunsCommand(marker)})})
    gots, after = model.tries(
        partial(jobs.load, {"model": "org/bad/model.ckpt"}, jobs.only_model, model.place / "links"), GOOD
    )
    failed_alike(gots, UnsafeFile, "load", ALL, "Nothing from the file was run", "system")
    assert not marker.exists()
    check_next_call(model, after)


def test_weights_of_another_shape_on_one_rank(model: Nodes) -> None:
    other = {**WEIGHTS, "2.bias": torch.ones(5)}
    model.hub.add_repo("org/bad", {"model.ckpt": jobs.saved(other)})
    bad = partial(jobs.load, {"model": "org/bad/model.ckpt"}, jobs.only_model)
    gots, after = model.tries(partial(jobs.by_rank, {2: bad}, GOOD), GOOD)
    failed_alike(gots, LoadError, "load", {2}, "2.bias")
    check_next_call(model, after)


def test_an_object_without_a_hook(model: Nodes) -> None:
    made = [(jobs.no_hook, ALL), (jobs.no_hook_on_rank_1, {1})]
    by_case = model.cases(*((partial(jobs.load, {"model": "org/model/good.ckpt"}, make), GOOD) for make, _ in made))
    texts = ("an object of type builtins.object", "custom_hooks=", "mark_as_transfer")
    for case, ((_, ranks), (gots, after)) in enumerate(zip(made, by_case, strict=True)):
        failed_alike(gots, NoHook, "load", ranks, *texts)
        check_next_call(model, after, case)


def test_two_names_for_one_link(model: Nodes) -> None:
    into = model.place / "links"
    pairs = [("model", "./model"), ("a//model", "a/model")]
    calls = [partial(jobs.collect, dict.fromkeys(names, "org/model/good.ckpt"), into) for names in pairs]
    by_case = model.cases(*((call, GOOD) for call in calls))
    assert not into.exists()
    for case, (names, (gots, after)) in enumerate(zip(pairs, by_case, strict=True)):
        failed_alike(gots, BadRequest, "agree", ALL, *map(repr, names), "would share the link")
        check_next_call(model, after, case)


def test_two_names_for_one_link_on_one_rank(model: Nodes) -> None:
    bad = partial(jobs.collect, dict.fromkeys(("model", "./model"), "org/model/good.ckpt"), model.place / "links")
    ranks = [0, 3]
    by_case = model.cases(*((partial(jobs.by_rank, {rank: bad}, GOOD), GOOD) for rank in ranks))
    for case, (rank, (gots, after)) in enumerate(zip(ranks, by_case, strict=True)):
        # The other ranks do not reach their second call, to load: their first call has failed too.
        failed_alike(gots, BadRequest, "agree", {rank}, "would share the link")
        check_next_call(model, after, case)


def test_a_name_whose_link_leaves_the_folder(model: Nodes) -> None:
    into = model.place / "a/b/links"
    names = ["../../x", "/x", "a/../../x", ".."]
    calls = [partial(jobs.collect, {name: "org/model/good.ckpt"}, into) for name in names]
    for case, (name, (gots, after)) in enumerate(
        zip(names, model.cases(*((call, GOOD) for call in calls)), strict=True)
    ):
        if name == "..":  # "...ckpt" is a valid name
            assert [list(found) for found in values(gots)] == [[".."]] * 4
        else:
            failed_alike(gots, BadRequest, "agree", ALL, "must be a relative path")
        check_next_call(model, after, case)
    assert not list(model.place.rglob("x.ckpt"))


def test_no_path_and_no_default_source(model: Nodes) -> None:
    gots, after = model.tries(partial(jobs.collect, {"model": None}), GOOD)
    failed_alike(gots, BadRequest, "agree", ALL, "'model' has no path, and there is no default source")
    check_next_call(model, after)


def test_a_hook_that_raises_an_unpicklable_error(model: Nodes) -> None:
    gots, after = model.tries(raise_unpicklable, GOOD)
    failed_alike(gots, LoadError, "load", {1}, "Unpicklable: no way")
    check_next_call(model, after)


class Unpicklable(Exception):
    def __reduce__(self) -> tuple[Any, ...]:
        raise TypeError("cannot be pickled")


def raise_unpicklable() -> None:
    import weightferry

    def hook(*_: object) -> None:
        if jobs.rank() == 1:
            raise Unpicklable("no way")

    pretrainer = weightferry.Pretrainer(None, {"model": object()}, {"model": "org/model/good.ckpt"}, {"model": hook})
    pretrainer.collect_files()
    try:
        pretrainer.load_collected()
    except CollectError as error:
        error.__cause__ = None
        raise
