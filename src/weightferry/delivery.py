"""Survey, plan, transfer and publish: until every domain has every file, and the right one."""

from __future__ import annotations

import pickle
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from weightferry.cache.layout import CacheLayout
from weightferry.cache.locks import Locks
from weightferry.cache.survey import Survey, Surveyor
from weightferry.cluster.agree import Agreed
from weightferry.cluster.control import Control
from weightferry.manifest import Manifest
from weightferry.settings import Settings
from weightferry.transfer.bring import Brought, bring
from weightferry.transfer.plan import Orders, plan
from weightferry.transfer.proof import judge
from weightferry.transfer.reading import unreachable

_ATTEMPTS = 2  # wrong bytes are asked for once more


@dataclass
class Delivered:
    """What one leader found in its cache and did about the rest; empty on other ranks.

    Attributes
    ----------
    held : mapping of int to str
        The files that were whole, by their place in `Manifest.staged()`, with their SHA-256 or an empty text.
    brought : Brought
        All transfers together.
    """

    held: Mapping[int, str] = field(default_factory=dict)
    brought: Brought = field(default_factory=Brought)


def deliver(control: Control, manifest: Manifest, agreed: Agreed, layout: CacheLayout, settings: Settings) -> Delivered:
    """Bring to every domain what it lacks; every rank calls it.

    Raises
    ------
    CollectError
        The same on every rank.
    """
    me = Delivered()
    hosts = {domain.leader: domain.host for domain in agreed.domains}
    surveyor = Surveyor(layout, manifest, Locks(settings.lock_timeout, control.check))
    surveying = _Surveying(control, manifest, surveyor, settings, agreed)
    doubted: Collection[int] = ()
    try:
        for attempt in range(1, _ATTEMPTS + 1):
            surveys = surveying.all(doubted)
            if _nothing_to_do(manifest, surveys, hosts):
                me.held = me.held or surveying.mine.whole
                control.seconds.setdefault("transfer", 0.0)
                break

            def transfer(surveys: Mapping[int, Survey] = surveys, attempt: int = attempt) -> Brought:
                mine = surveying.mine.whole
                me.held = me.held if attempt > 1 else mine
                lacking = tuple(index for index in manifest.contents() if index not in mine)
                brought = bring(Orders(plan(manifest, surveys), lacking, hosts, attempt), surveyor, settings, control)
                me.brought += brought
                return brought

            def verdict(
                values: Mapping[int, Brought], surveys: Mapping[int, Survey] = surveys, attempt: int = attempt
            ) -> tuple[int, ...]:
                return judge(manifest, surveys, values, hosts, final=attempt == _ATTEMPTS)

            doubted = control.round("transfer", transfer, verdict, agreed.leaders, agreed.role(control.rank))
            if not doubted:
                break
    finally:
        surveyor.release()
    return me


def _nothing_to_do(manifest: Manifest, surveys: Mapping[int, Survey], hosts: Mapping[int, str]) -> bool:
    """Whether every domain has every file, and the same bytes; every rank concludes the same from the same."""
    whole = all(len(survey.whole) == sum(1 for _ in manifest.staged()) for survey in surveys.values())
    return whole and not judge(manifest, surveys, dict.fromkeys(surveys, Brought()), hosts, final=False)


class _Surveying:
    """The surveys of all domains, with all locks on what is missing."""

    def __init__(
        self, control: Control, manifest: Manifest, surveyor: Surveyor, settings: Settings, agreed: Agreed
    ) -> None:
        self._control, self._manifest, self._surveyor, self._settings = control, manifest, surveyor, settings
        self._leaders, self._role = agreed.leaders, agreed.role(control.rank)
        self.mine = Survey()

    def all(self, doubted: Collection[int]) -> Mapping[int, Survey]:
        """Survey every domain at once; when another job holds locks, one after the other.

        The order is one that all jobs share. So no two of them ever wait for each other: whoever waits holds only
        locks of domains that come before.
        """
        surveys: Mapping[int, Survey] = self._control.round(
            "survey", lambda: self._look(doubted), _compact, self._leaders, self._role
        )
        if any(survey.busy for survey in surveys.values()):
            self._surveyor.release()
            for leader in sorted(surveys, key=lambda leader: surveys[leader].cache):
                surveys = {**surveys, **self._control.round("survey", self._wait, dict, (leader,), self._role)}
        return surveys

    def _wait(self) -> Survey:
        with self._control.paused("waits for another job that brings the same files"):
            return self._look((), wait=True)

    def _look(self, doubted: Collection[int], *, wait: bool = False) -> Survey:
        self.mine = self._surveyor.survey(wait=wait, doubted=doubted)
        missing = [index for index in range(len(self._surveyor.files)) if index not in self.mine.whole]
        cannot = {}
        if len(self._leaders) > 1:
            cannot = unreachable(self._manifest, missing, self._settings)
        # The others need the SHA-256 only where the manifest promises nothing.
        whole = {i: "" if self._surveyor.files[i][1].checksum else text for i, text in self.mine.whole.items()}
        return replace(self.mine, whole=whole, unreachable=cannot)


def _compact(surveys: Mapping[int, Survey]) -> dict[int, Survey]:
    """Let equal surveys be one object: thousands of ranks read the pickle of all of them."""
    seen: dict[bytes, Survey] = {}
    return {leader: seen.setdefault(pickle.dumps(survey), survey) for leader, survey in surveys.items()}
