"""The Hub, asked only for what the caches do not know; and what is used of them when the Hub gives no answer."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Protocol, TypeVar, cast

from weightferry.errors import OriginUnreachable, SourceNotFound
from weightferry.manifest import PinnedSource
from weightferry.origins.base import Origin, RateLimited, TransientOriginError, Unreachable, select_below
from weightferry.origins.listing import KnownListings, Listing, is_commit_id
from weightferry.origins.lockfile import ReadCached, open_bytes
from weightferry.origins.registry import origin_for
from weightferry.settings import Settings
from weightferry.sources import Source

T = TypeVar("T")

_POLL_INTERVAL = 0.2  # seconds between two looks whether the operation has failed on another rank


class Hub(Origin, Protocol):
    """An origin with branches."""

    def find_commit(self, source: Source, timeout: float) -> str:
        """Return the current commit of a branch or tag."""
        ...


@dataclass(frozen=True)
class Fallback:
    """A branch or tag that is taken to be at the commit that a cache knows, and why the Hub gave no answer."""

    listing: Listing
    reason: str


@dataclass(frozen=True)
class LookupRules:
    """What may be taken from the caches.

    Attributes
    ----------
    patience : float
        Seconds for the Hub to say at which commit a branch is, if a cache knows one.
    use_known_branches : bool
        Whether a branch may be at the commit that a cache knows. False: the Hub is asked as if no cache knew it.
    others_may_answer : bool
        Whether another rank may get an answer, or know more. Then the first failure of the Hub raises `Unreachable`,
        so that this rank does not retry. False: without an answer the commit that a cache knows is used.
    hub_failure : str
        Why the Hub gives no answer, if the job knows that already: then it is not asked about a known branch.
    """

    patience: float
    use_known_branches: bool = True
    others_may_answer: bool = False
    hub_failure: str = ""


class KnownCommits:
    """Resolves sources of the Hub with what the caches know. A commit id whose files they know needs no request.

    A branch or tag is looked up at the Hub. If it still is at a commit whose files a cache knows, this costs one small
    request. What the Hub refuses is an error, whatever the caches know.

    Parameters
    ----------
    known
        What the caches know.
    read_cached
        Returns the content of a file that is read to resolve, such as an index of shards, if a cache has it.
    rules
        What may be taken from the caches.
    check
        Called while the Hub is waited for; its exception ends the wait.
    create
        Creates the origin of a scheme; that of ``hf`` has the methods of `Hub`.

    Attributes
    ----------
    listings : list of Listing
        What this object returned, to be recorded in the caches.
    fallbacks : list of Fallback
        The branches that were not looked up.
    origin_answered : bool
        Whether the Hub was asked about every source.
    failure : TransientOriginError or None
        Why the Hub gave no answer to the last question; None after an answer.
    failed : tuple of Source and (sequence of str), or None
        The question without an answer.
    """

    def __init__(
        self,
        known: KnownListings,
        read_cached: ReadCached,
        rules: LookupRules,
        check: Callable[[], None],
        create: Callable[[str, Settings], Origin] = origin_for,
    ) -> None:
        self.known, self.read_cached, self.rules, self.check = known, read_cached, rules, check
        self._create = create
        self.listings: list[Listing] = []
        self.fallbacks: list[Fallback] = []
        self.origin_answered = True
        self.failure: TransientOriginError | None = None
        self.failed: tuple[Source, Sequence[str]] | None = None

    def origins(self, scheme: str, settings: Settings) -> Origin:
        """Create the origin of a scheme, for `pin_sources`."""
        if scheme != "hf":
            return self._create(scheme, settings)
        return _KnownHub(self, lambda: cast(Hub, self._create(scheme, settings)))

    @contextmanager
    def noting_failure(self, source: Source, paths: Sequence[str]) -> Iterator[None]:
        """Note whether the Hub answers a question."""
        try:
            yield
        except RateLimited:
            raise  # the Hub works
        except TransientOriginError as error:
            self.failure, self.failed = error, (source, paths)
            raise
        self.failure = self.failed = None

    def advice(self) -> str:
        """Return what the user can change, for the error about the question that has no answer."""
        if self.failed is None:
            return ""
        source, paths = self.failed
        root, revision = replace(source, revision=None), source.revision or "main"
        known = self.known.find(source, paths)
        if known is not None and known.paths == tuple(paths):
            return (
                f"The caches know commit {known.pinned.commit} of {revision}, staged on {staged_on(known)}: name it as "
                "the revision, or set WEIGHTFERRY_OFFLINE_FALLBACK=1 to use it"
            )
        if known is not None:
            listed = ", ".join(self.known.listed_paths(source))
            lacking = ", ".join(path or "/" for path in paths if path not in known.paths)
            return (
                f"Of {root} at {revision} the caches know only {listed}, and not {lacking}: stage these once where the "
                "Hub can be reached"
            )
        if revisions := self.known.revisions(source):
            return (
                f"The caches know {root} only at {', '.join(revisions)}: use one of these, or stage {revision} "
                "once where the Hub can be reached"
            )
        return f"No cache knows {root}: stage it once where the Hub can be reached"


class _KnownHub:
    """The Hub behind the caches, for one source; see `Origin`."""

    def __init__(self, commits: KnownCommits, create: Callable[[], Hub]) -> None:
        self._commits, self._create = commits, create
        self._created: Hub | None = None

    @property
    def _hub(self) -> Hub:
        # Made when it is asked: the library of the Hub may send requests of its own.
        self._created = self._created or self._create()
        return self._created

    def resolve(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        """See `Origin.resolve`."""
        known = self._find(source, paths)
        if known is not None and is_commit_id(source.revision):
            self._commits.origin_answered = False
            return self._use(known)
        if known is not None and self._commits.rules.use_known_branches:
            return self._look_up(source, paths, known)
        return self._ask(source, paths)

    def _find(self, source: Source, paths: Sequence[str]) -> Listing | None:
        """Return what the caches know, if they know it for all `paths`."""
        known = self._commits.known.find(source, paths)
        return known if known is not None and known.paths == tuple(paths) else None

    def _ask(self, source: Source, paths: Sequence[str]) -> PinnedSource:
        try:
            with self._commits.noting_failure(source, paths):
                pinned = self._hub.resolve(source, paths)
        except RateLimited:
            raise
        except TransientOriginError as error:
            if self._commits.rules.others_may_answer:
                raise Unreachable(str(error), subject=str(source)) from error
            raise
        moment = 0.0 if is_commit_id(source.revision) else time.time()
        self._commits.listings.append(Listing(pinned, tuple(paths), moment))
        return pinned

    def _look_up(self, source: Source, paths: Sequence[str], known: Listing) -> PinnedSource:
        """Ask at which commit a branch is, and ask for its files only if no cache knows those of this commit."""
        rules = self._commits.rules
        if rules.hub_failure:
            return self._fall_back(known, rules.hub_failure)
        try:
            with self._commits.noting_failure(source, paths):
                commit = self._find_commit(source)
        except RateLimited:
            raise
        except TransientOriginError as error:
            if rules.others_may_answer:
                raise Unreachable(str(error), subject=str(source)) from error
            return self._fall_back(known, str(error))
        listing = self._find(replace(source, revision=commit), paths)
        if listing is None:
            return self._ask(source, paths)
        return self._use(replace(listing, pinned=replace(listing.pinned, source=source), time=time.time()))

    def _find_commit(self, source: Source) -> str:
        patience, hub = self._commits.rules.patience, self._hub
        try:
            return _within(patience, lambda: hub.find_commit(source, patience), self._commits.check)
        except TimeoutError:
            raise Unreachable(f"no answer within {patience:.1f} s", subject=str(source)) from None

    def _fall_back(self, known: Listing, reason: str) -> PinnedSource:
        self._commits.origin_answered = False
        try:
            pinned = self._use(known)
        except SourceNotFound as error:
            # The branch may have moved to a commit that has the file.
            text = f"the Hub gave no answer ({reason}), and commit {known.pinned.commit}, which a cache knows, has"
            raise OriginUnreachable(f"{text} {error}", subject=error.subject) from error
        self._commits.fallbacks.append(Fallback(known, reason))
        return pinned

    def _use(self, known: Listing) -> PinnedSource:
        names = [file.path for file in known.pinned.files]
        for path in known.paths:
            select_below(path, names, str(known.pinned.source))
        used = known.restricted()
        self._commits.listings.append(used)
        return used.pinned

    def read(
        self, pinned: PinnedSource, path: str, start: int = 0, stop: int | None = None
    ) -> AbstractContextManager[Iterator[bytes]]:
        """See `Origin.read`."""
        content = self._commits.read_cached(pinned, pinned.file(path))
        return self._hub.read(pinned, path, start, stop) if content is None else open_bytes(content[start:stop])

    def check_access(self, source: Source) -> None:
        """See `Origin.check_access`."""
        self._hub.check_access(source)

    def close(self) -> None:
        """See `Origin.close`."""
        if self._created is not None:
            self._created.close()


def staged_on(listing: Listing) -> str:
    """Return when a branch was last seen at the commit of a listing, as a date in UTC."""
    return time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(listing.time))


def _within(seconds: float, call: Callable[[], T], check: Callable[[], None]) -> T:
    """Return the value of `call`. It runs in a thread of its own: no timeout covers the lookup of a host name.

    Raises
    ------
    TimeoutError
        The call takes longer than `seconds`. Its thread ends later, by the call's own timeouts.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 -- raised again by the thread that waits
            future.set_exception(error)

    threading.Thread(target=run, name="weightferry-lookup", daemon=True).start()
    deadline = time.monotonic() + seconds
    while not wait([future], min(_POLL_INTERVAL, max(0.0, deadline - time.monotonic()))).done:
        check()
        if time.monotonic() >= deadline:
            raise TimeoutError
    return future.result()
