"""One call of `Pretrainer.collect_files`: its arguments, and how every rank gets its files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from weightferry.cluster.coordinator import Coordinator
from weightferry.errors import BadRequest
from weightferry.fetching import FetchConfig, LocalStrategy, is_local_strategy
from weightferry.origins.access import DEFAULT_ACCESS, OriginAccess
from weightferry.phases.job_request import RankRequest
from weightferry.phases.reuse import Wanted, find_reusable
from weightferry.settings import Settings
from weightferry.sources import FetchSource, SourceLike, SourceRequest, parse_source
from weightferry.staging import Collected, collect

PARAMFILE_EXT = ".ckpt"
"""The extension of every link in `collect_in`, and of the files in a default source."""


@dataclass(frozen=True)
class CollectArguments:
    """The arguments of one `Pretrainer.collect_files` that say what comes from where.

    Attributes
    ----------
    default_source : str or Path or FetchSource or None
        The source of loadables without a path.
    local_strategy : LocalStrategy
    fetch_config : FetchConfig or None
    """

    default_source: SourceLike | None = None
    local_strategy: LocalStrategy = LocalStrategy.SYMLINK
    fetch_config: FetchConfig | None = None

    @classmethod
    def of(cls, default_source: Any, second: Any, local_strategy: Any, fetch_config: Any) -> CollectArguments:
        """Return the arguments from a call with the signature of SpeechBrain 1.0 or of SpeechBrain 1.1.

        Parameters
        ----------
        second
            A bool: `internal_ddp_handling`, and the other arguments are in their places. Otherwise the local strategy:
            then the third argument may be the fetch configuration, as in SpeechBrain 1.1.

        Raises
        ------
        BadRequest
            An argument has no valid type.
        """
        if not isinstance(second, bool):
            if not is_local_strategy(second):
                raise BadRequest(
                    "the second argument of collect_files must be True or False (internal_ddp_handling) or a "
                    f"LocalStrategy (SYMLINK, COPY, COPY_SKIP_CACHE or NO_LINK); it is {second!r}"
                )
            if not is_local_strategy(local_strategy):
                if fetch_config is not None:
                    raise BadRequest("collect_files was given two values for fetch_config; pass one")
                fetch_config = local_strategy
            local_strategy = second
        source = FetchSource.of(default_source) or default_source
        return cls(source, LocalStrategy.of(local_strategy), FetchConfig.of(fetch_config))

    def for_other_ranks(self) -> CollectArguments:
        """Return the arguments without a token: other ranks use their own token, if they have one."""
        if self.fetch_config is None or not isinstance(self.fetch_config.token, str):
            return self
        return replace(self, fetch_config=replace(self.fetch_config, token=None))


class Collection:
    """Collects the files of one call on one rank.

    Parameters
    ----------
    make_arguments, make_requests
        Return the arguments, and the file of each loadable; called inside the first phase, so that an error that they
        raise fails the operation on every rank.
    collect_in
        The folder for links, absolute; None: no links.
    """

    def __init__(
        self,
        make_arguments: Callable[[], CollectArguments],
        make_requests: Callable[[CollectArguments], Mapping[str, SourceRequest]],
        collect_in: Path | None,
    ) -> None:
        self._make_arguments, self._make_requests, self._collect_in = make_arguments, make_requests, collect_in
        self._arguments = CollectArguments()
        self._requests: Mapping[str, SourceRequest] = {}

    def run(self, coordinator: Coordinator, settings: Settings, lockfile: Path | None) -> Collected:
        """Collect the files; collective.

        Raises
        ------
        CollectError
            The same on every rank.
        """
        same = find_reusable(coordinator, self._find_existing, settings)
        reused = {name: self._link(name) for name, request in self._requests.items() if (name, request) in same}
        collected = collect(
            lambda: self._rank_request(reused),
            coordinator,
            settings,
            lockfile=lockfile,
            access=_origin_access(self._arguments.fetch_config),
        )
        paths = {name: reused.get(name) or collected.paths[name] for name in self._requests}
        return replace(collected, paths=paths)

    def expected_paths(self) -> dict[str, Path]:
        """Return where the files will be, as far as that is known before they are collected.

        Raises
        ------
        BadRequest
            The arguments or the sources are not valid.
        """
        self._arguments = self._make_arguments()
        self._requests = self._make_requests(self._arguments)
        paths = {}
        for name, request in self._requests.items():
            source = parse_source(request, _is_folder)
            if self._makes_links:
                paths[name] = self._link(name)
            elif source.scheme == "file":
                paths[name] = Path(source.root) / source.path
        return paths

    @property
    def _makes_links(self) -> bool:
        return self._collect_in is not None and self._arguments.local_strategy is not LocalStrategy.NO_LINK

    def _link(self, name: str) -> Path:
        assert self._collect_in is not None  # noqa: S101 -- there are links
        return self._collect_in / f"{name}{PARAMFILE_EXT}"

    def _find_existing(self) -> dict[Wanted, Path | None]:
        """Return every file that this rank wants, with the path of the existing file if it may be used as it is."""
        self._arguments = self._make_arguments()
        self._requests = self._make_requests(self._arguments)
        return {
            (name, request): self._link(name) if self._may_reuse(request) else None
            for name, request in self._requests.items()
        }

    def _may_reuse(self, request: SourceRequest) -> bool:
        config = self._arguments.fetch_config
        if config is None or self._collect_in is None or config.overwrite:
            return False
        return not (config.allow_updates and parse_source(request, _is_folder).scheme == "hf")

    def _rank_request(self, reused: Mapping[str, Path]) -> RankRequest:
        requests = {name: request for name, request in self._requests.items() if name not in reused}
        if not self._makes_links:
            return RankRequest(requests)
        copy = self._arguments.local_strategy in (LocalStrategy.COPY, LocalStrategy.COPY_SKIP_CACHE)
        for name, request in requests.items():
            if copy and request.shards:
                raise BadRequest(
                    f"{name!r} is an index of shards, and local_strategy COPY copies single files only; use SYMLINK or "
                    "NO_LINK",
                    subject=name,
                )
        return RankRequest(requests, self._collect_in, PARAMFILE_EXT, copy)


def _origin_access(config: FetchConfig | None) -> OriginAccess:
    if config is None:
        return DEFAULT_ACCESS
    cache = config.huggingface_cache_dir
    return OriginAccess(config.allow_network, config.token, None if cache is None else Path(cache).expanduser())


def _is_folder(text: str) -> bool:
    return Path(text).is_dir()
