"""What is taken from the caches and what is asked, for a Hub that answers, refuses, fails or is silent."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from tests.unit.doubles import FakeMonitor, Over, hub_source
from weightferry.errors import AccessDenied, OriginUnreachable, SourceNotFound
from weightferry.manifest import File, PinnedSource
from weightferry.origins.base import Busy, RateLimited, Silent, TransientOriginError, Unreachable
from weightferry.origins.known_commits import KnownCommits, LookupRules
from weightferry.origins.listing import KnownListings, Listing
from weightferry.settings import Settings
from weightferry.sources import Source
from weightferry.testing.origin import FakeOrigin, Fault

FILES = {"config.json": b"{}", "w/model.bin": b"123"}
BRANCH = hub_source("dev")


class FakeHub(FakeOrigin):
    """A Hub in memory; `answer` replaces the answer about a branch."""

    def __init__(self) -> None:
        super().__init__(FILES)
        self.answer: Callable[[], None] = lambda: None
        self.lookups: list[Source] = []
        self.made = 0

    def create(self, scheme: str, settings: Settings) -> FakeHub:
        self.made += 1
        return self

    def find_commit(self, source: Source, timeout: float) -> str:
        self.lookups.append(source)
        self.answer()
        return super().resolve(source, [""]).commit

    @property
    def commit(self) -> str:
        return super().resolve(BRANCH, [""]).commit


def failing(error: Exception) -> Callable[[], None]:
    def answer() -> None:
        raise error

    return answer


class Case:
    """A Hub, and a cache that knows one listing."""

    def __init__(self, settings: Settings) -> None:
        self.hub, self.settings, self.monitor = FakeHub(), settings, FakeMonitor()
        self.staged = Listing(self.hub.resolve(BRANCH, [""]), ("",), 1_000_000.0)
        self.commit = self.staged.pinned.commit
        self.hub.resolves.clear()
        self.rules = LookupRules(0.3)
        self.cached: dict[str, bytes] = {}

    def commits(self, *known: Listing) -> KnownCommits:
        def read(pinned: PinnedSource, file: File) -> bytes | None:
            return self.cached.get(file.path)

        listings = KnownListings(lambda _: known or (self.staged,))
        return KnownCommits(listings, read, self.rules, self.monitor.check, self.hub.create)

    def resolve(self, source: Source = BRANCH, *paths: str) -> tuple[KnownCommits, PinnedSource]:
        commits = self.commits()
        pinned = commits.origins("hf", self.settings).resolve(source, paths or [""])
        return commits, pinned


@pytest.fixture
def case(settings: Settings) -> Case:
    return Case(settings)


class TestWithoutAFailure:
    def test_a_commit_asks_nothing_and_makes_no_client(self, case: Case) -> None:
        commits, pinned = case.resolve(hub_source(case.commit), "w")
        assert [file.path for file in pinned.files] == ["w/model.bin"]
        assert pinned.source == hub_source(case.commit)
        assert not commits.origin_answered
        assert case.hub.made == 0
        assert [(one.paths, one.time) for one in commits.listings] == [(("w",), 0.0)]

    def test_a_commit_that_lacks_a_file(self, case: Case) -> None:
        with pytest.raises(SourceNotFound, match=r"'w/modle\.bin' in the repository; did you mean w/model\.bin"):
            case.resolve(hub_source(case.commit), "w/modle.bin")
        assert case.hub.made == 0

    def test_a_branch_that_stayed_costs_a_lookup(self, case: Case) -> None:
        before = time.time()
        commits, pinned = case.resolve()
        assert (pinned.commit, pinned.source) == (case.commit, BRANCH)
        assert (len(case.hub.lookups), commits.origin_answered, commits.fallbacks) == (1, True, [])
        assert case.hub.resolves == [("org/model", ("",))], "by the lookup"
        assert commits.listings[0].time >= before, "it was seen there now"

    def test_a_branch_that_moved(self, case: Case) -> None:
        case.hub.files["config.json"] = b"{1}"
        commits, pinned = case.resolve()
        assert pinned.commit == case.hub.commit != case.commit
        assert [one.pinned.commit for one in commits.listings] == [pinned.commit]

    def test_a_branch_that_moved_to_a_commit_that_is_known(self, case: Case) -> None:
        newer = replace(case.staged, pinned=replace(case.staged.pinned, commit="f" * 40), time=2_000_000.0)
        commits = case.commits(case.staged, newer)
        assert commits.origins("hf", case.settings).resolve(BRANCH, [""]).commit == case.commit
        assert len(case.hub.resolves) == len(case.hub.lookups) == 1

    @pytest.mark.parametrize("source", [hub_source("other"), hub_source("c" * 40), hub_source("dev", root="org/b")])
    def test_what_no_cache_knows_is_asked_in_full(self, case: Case, source: Source) -> None:
        commits, pinned = case.resolve(source)
        assert case.hub.lookups == []
        assert case.hub.resolves == [(source.root, ("",))]
        (recorded,) = commits.listings
        assert (recorded.pinned, recorded.paths) == (pinned, ("",))
        assert (recorded.time == 0.0) is (source.revision == "c" * 40)

    def test_known_branches_are_asked_in_full_where_the_fallback_is_forbidden(self, case: Case) -> None:
        case.rules = replace(case.rules, use_known_branches=False)
        case.resolve()
        assert case.hub.lookups == []
        case.resolve(hub_source(case.commit))
        assert len(case.hub.resolves) == 1

    def test_cached_content_is_read_from_the_cache(self, case: Case) -> None:
        origin = case.commits().origins("hf", case.settings)
        pinned = origin.resolve(hub_source(case.commit), [""])
        case.cached["config.json"] = b"{}"
        for path, start, content in (("config.json", 0, b"{}"), ("config.json", 1, b"}"), ("w/model.bin", 0, b"123")):
            with origin.read(pinned, path, start) as chunks:
                assert b"".join(chunks) == content
        assert [read.path for read in case.hub.reads] == ["w/model.bin"]
        origin.close()
        assert case.hub.closed == 1

    def test_other_schemes_are_left_alone(self, case: Case) -> None:
        assert case.commits().origins("s3", case.settings) is case.hub


FAILURES = [Unreachable("refused"), Silent("silent"), Busy("HTTP 503"), TransientOriginError("HTTP 500")]


class TestFailures:
    @pytest.mark.parametrize("error", FAILURES, ids=str)
    def test_the_commit_that_is_known_is_used(self, case: Case, error: TransientOriginError) -> None:
        case.hub.answer = failing(error)
        commits, pinned = case.resolve()
        assert pinned.commit == case.commit
        (fallback,) = commits.fallbacks
        assert (fallback.listing.pinned.commit, fallback.listing.time) == (case.commit, 1_000_000.0)
        assert str(error) in fallback.reason
        assert not commits.origin_answered
        assert commits.listings[0].time == 1_000_000.0, "it was not seen there now"
        assert len(case.hub.lookups) == 1, "one try"

    @pytest.mark.parametrize("error", FAILURES, ids=str)
    def test_another_rank_may_ask(self, case: Case, error: TransientOriginError) -> None:
        case.rules = replace(case.rules, others_may_answer=True)
        case.hub.answer = failing(error)
        commits = case.commits()
        with pytest.raises(Unreachable, match=str(error)):
            commits.origins("hf", case.settings).resolve(BRANCH, [""])
        assert commits.failure is error
        assert commits.listings == []

    def test_a_failure_that_is_known_is_not_waited_for_again(self, case: Case) -> None:
        case.rules = replace(case.rules, hub_failure="packets vanish")
        commits, _ = case.resolve()
        assert case.hub.made == 0
        assert commits.fallbacks[0].reason == "packets vanish"

    @pytest.mark.parametrize("error", FAILURES, ids=str)
    def test_what_no_cache_knows_is_not_retried_where_another_rank_may_ask(
        self, case: Case, error: TransientOriginError
    ) -> None:
        case.hub.faults.append(Fault(on="resolve", times=None, error=error))
        for others_may_answer, kind in ((True, Unreachable), (False, type(error))):
            case.rules = replace(case.rules, others_may_answer=others_may_answer)
            commits = case.commits()
            with pytest.raises(kind, match=str(error)):
                commits.origins("hf", case.settings).resolve(hub_source("new"), [""])
            assert commits.failure is error

    @pytest.mark.parametrize("error", [AccessDenied("401"), SourceNotFound("404"), RateLimited("429")], ids=str)
    def test_what_the_hub_says_counts(self, case: Case, error: Exception) -> None:
        case.hub.answer = failing(error)
        commits = case.commits()
        with pytest.raises(type(error)):
            commits.origins("hf", case.settings).resolve(BRANCH, [""])
        assert commits.fallbacks == []
        assert commits.failure is None

    def test_a_file_that_the_known_commit_lacks(self, case: Case) -> None:
        case.hub.answer = failing(Unreachable("refused"))
        with pytest.raises(
            OriginUnreachable, match=rf"\(refused\), and commit {case.commit}.* has no file or folder 'x'"
        ):
            case.resolve(BRANCH, "x")

    def test_paths_that_are_not_known(self, case: Case) -> None:
        case.staged = replace(case.staged, paths=("config.json",)).restricted()
        case.hub.faults.append(_unreachable())
        commits = case.commits()
        with pytest.raises(Unreachable):
            commits.origins("hf", case.settings).resolve(BRANCH, ["w"])
        assert "know only config.json, and not w" in commits.advice()

    def test_an_answer_after_a_failure(self, case: Case) -> None:
        case.hub.faults.append(_unreachable())
        commits = case.commits()
        origin = commits.origins("hf", case.settings)
        with pytest.raises(Unreachable):
            origin.resolve(hub_source("new"), [""])
        assert "only at dev" in commits.advice()
        origin.resolve(hub_source("new"), [""])
        assert (commits.failure, commits.advice()) == (None, "")


def _unreachable() -> Fault:
    return Fault(on="resolve", error=Unreachable("refused"))


class TestSilence:
    @pytest.fixture
    def released(self, case: Case) -> Iterator[threading.Event]:
        event = threading.Event()

        def wait() -> None:
            event.wait(20)

        case.hub.answer = wait
        yield event
        event.set()

    def test_the_hub_is_not_waited_for_longer_than_the_patience(self, case: Case, released: threading.Event) -> None:
        """Whatever it waits for: no timeout of a connection covers the lookup of a name."""
        began = time.monotonic()
        commits, pinned = case.resolve()
        assert 0.3 <= time.monotonic() - began < 3
        assert pinned.commit == case.commit
        assert commits.fallbacks[0].reason == "no answer within 0.3 s"

    def test_the_wait_ends_when_the_operation_has_failed(self, case: Case, released: threading.Event) -> None:
        case.rules = replace(case.rules, patience=20.0)
        case.monitor.over = True
        began = time.monotonic()
        with pytest.raises(Over):
            case.resolve()
        assert time.monotonic() - began < 5
