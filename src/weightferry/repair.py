"""Bring damaged content anew: good bytes come from a node that has them, else from the origin."""

from __future__ import annotations

from collections.abc import Mapping

from weightferry.cache.layout import CacheLayout
from weightferry.cache.verify import Verified, remove_damaged
from weightferry.cluster.agree import Wish
from weightferry.cluster.control import Control
from weightferry.settings import Settings
from weightferry.sources import Ask
from weightferry.staging import collect


def repair(control: Control, layout: CacheLayout, settings: Settings, found: Mapping[int, Verified]) -> tuple[str, ...]:
    """Remove what is damaged and stage it again, on all nodes at once; every rank calls it.

    Parameters
    ----------
    found
        By leader, what was found; the same on every rank.

    Returns
    -------
    tuple of str
        Sources that are not of the Hub: the cache does not know where they came from. Their damaged content is removed.

    Raises
    ------
    CollectError
        The same on every rank.
    """

    def remove() -> None:
        for damage in found.get(control.rank, Verified()).damaged:
            remove_damaged(layout, damage)

    control.round("repair", remove, lambda _: None)
    asks: dict[str, Ask] = {}
    lost: dict[str, None] = {}
    for damage in (one for said in found.values() for one in said.damaged):
        if not damage.repo_id or not damage.commits or not damage.paths:
            lost[damage.source] = None
            continue
        for path in damage.paths:
            source = f"hf://{damage.repo_id}@{damage.commits[-1]}"
            asks[f"{source}/{path}"] = Ask.of(source, path)
    if asks:
        collect(lambda: Wish(asks), control, settings)
    return tuple(lost)
