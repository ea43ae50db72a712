"""Pretrainer: what the user declares, with the interface of SpeechBrain's class of that name."""

from __future__ import annotations

import logging
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from weightferry.cluster.connect import operation
from weightferry.errors import BadRequest
from weightferry.origins.shard_index import is_index
from weightferry.phases.agree import RankRequest
from weightferry.report.run import RunReport
from weightferry.settings import Settings
from weightferry.sources import FetchSource, SourceLike, SourceRequest, safe_path
from weightferry.staging import collect

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from weightferry.loading.load_all import LoadRequest
    from weightferry.loading.options import LoadOptions

logger = logging.getLogger(__name__)

PARAMFILE_EXT = ".ckpt"
"""The ending of every link in `collect_in`, and of the files looked for in a default source."""


class Pretrainer:
    """Collects pretrained files on every node and loads them on every rank.

    `collect_files` and `load_collected` are collective: every rank calls them, in the same order. One process without
    any process group is the same with one rank.

    Guaranteed: what `collect_files` returns was opened on this rank and has the size, and when it was transferred the
    checksum, that its origin publishes; when anything fails anywhere, every rank raises. Not guaranteed: that nobody
    removes a file from the cache afterwards.

    Parameters
    ----------
    collect_in : str or Path or None
        Folder for the links, made with its parents; the link of a loadable is ``NAME.ckpt``. None: no links.
    loadables : mapping of str to object
        What is loaded into, by name.
    paths : mapping of str to (str or FetchSource)
        By name, a file: its last part is the file's name, the rest is a source. With an index of shards
        (``org/name/model.safetensors.index.json``) come its shards; a path that ends in a slash (``org/name/``) is a
        whole folder. Loadables without a path come from the default source.
    custom_hooks : mapping of str to callable
        By name, ``hook(object, path)``; wins over the hooks of the object's class.
    conditions : mapping of str to (bool or callable)
        By name, whether it takes part; a callable is asked each time.
    cache_dir : str or Path, optional
        The cache folder of this rank.
    options : mapping of str to LoadOptions
        By name, how it is loaded: strictness, other names, what its pickle may use.
    lockfile : str or Path, optional
        As ``weightferry prefetch`` wrote it: `collect_files` resolves from it and asks no origin what there is.
    settings : Settings, optional
        All limits; default: from the environment. `cache_dir` wins over the one in it.
    """

    def __init__(
        self,
        collect_in: str | Path | None = "./model_checkpoints",
        loadables: Mapping[str, Any] | None = None,
        paths: Mapping[str, str | FetchSource] | None = None,
        custom_hooks: Mapping[str, Callable[[Any, Path], object]] | None = None,
        conditions: Mapping[str, bool | Callable[[], bool]] | None = None,
        *,
        options: Mapping[str, LoadOptions] | None = None,
        lockfile: str | Path | None = None,
        cache_dir: str | Path | None = None,
        settings: Settings | None = None,
    ) -> None:
        self.loadables: dict[str, Any] = {}
        self.paths: dict[str, str | FetchSource] = {}
        self.custom_hooks: dict[str, Callable[[Any, Path], object]] = {}
        self.conditions: dict[str, bool | Callable[[], bool]] = {}
        self.options: dict[str, LoadOptions] = {}
        self.set_collect_in(collect_in)
        self.add_loadables(loadables or {})
        self.add_paths(paths or {})
        self.add_custom_hooks(custom_hooks or {})
        self.add_conditions(conditions or {})
        self.add_options(options or {})
        self.report: RunReport | None = None
        self._settings, self._cache_dir = settings, cache_dir
        self._lockfile = None if lockfile is None else Path(lockfile).expanduser().absolute()
        self._collected: dict[str, Path] = {}
        self._alone = False
        self._group: ProcessGroup | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(collect_in={self.collect_in}, loadables={list(self.loadables)}, "
            f"collected={list(self._collected)})"
        )

    def set_collect_in(self, path: str | Path | None) -> None:
        """Change the folder for the links."""
        self.collect_in = None if path is None else Path(path)

    def add_loadables(self, loadables: Mapping[str, Any]) -> None:
        """Add or replace loadables, by name."""
        self.loadables.update(loadables)

    def add_paths(self, paths: Mapping[str, str | FetchSource]) -> None:
        """Add or replace paths, by name."""
        self.paths.update(paths)

    def add_custom_hooks(self, custom_hooks: Mapping[str, Callable[[Any, Path], object]]) -> None:
        """Add or replace custom hooks, by name."""
        self.custom_hooks.update(custom_hooks)

    def add_conditions(self, conditions: Mapping[str, bool | Callable[[], bool]]) -> None:
        """Add or replace conditions, by name."""
        self.conditions.update(conditions)

    def add_options(self, options: Mapping[str, LoadOptions]) -> None:
        """Add or replace options of loadables, by name."""
        self.options.update(options)

    @overload
    @staticmethod
    def split_path(path: str | Path) -> tuple[str, str]: ...

    @overload
    @staticmethod
    def split_path(path: FetchSource) -> tuple[FetchSource, str]: ...

    @staticmethod
    def split_path(path: str | Path | FetchSource) -> tuple[str | FetchSource, str]:
        """Split a path, URL or Hub path into its source and the name of the file.

        A name alone is a file of the current folder: ``("./", name)``.
        """
        if isinstance(path, FetchSource):
            source, name = Pretrainer.split_path(path.path)
            return FetchSource(path.FetchFrom, source), name
        text = str(path)
        # The slashes in a query (a signed URL's, say) do not split.
        head, mark, query = text.partition("?") if "://" in text else (text, "", "")
        source, slash, name = head.rpartition("/")
        return (source or "/" if slash else "./"), name + mark + query

    def is_loadable(self, name: str) -> bool:
        """Whether the condition of `name`, if there is one, holds."""
        condition = self.conditions.get(name, True)
        return bool(condition() if callable(condition) else condition)

    def collect_files(
        self,
        default_source: SourceLike | None = None,
        internal_ddp_handling: bool = True,
        *,
        group: ProcessGroup | None = None,
    ) -> dict[str, Path]:
        """Bring the file of every loadable onto every node, and link it in `collect_in`; collective.

        Parameters
        ----------
        default_source : str or Path or FetchSource, optional
            Where the file ``NAME.ckpt`` of a loadable without a path is.
        internal_ddp_handling : bool
            False: this process alone, no coordination with other ranks.
        group : torch.distributed.ProcessGroup, optional
            The ranks that take part, here and in `load_collected`; None: all of the default process group.

        Returns
        -------
        dict of str to Path
            By name, the absolute local path to load from: the link, or without `collect_in` the file itself. Nothing
            for loadables whose condition does not hold.

        Raises
        ------
        CollectError
            The same on every rank: `BadRequest` for a loadable without path and default source, or for names that make
            no link; whatever the origin, the disk or another rank has failed with.
        """
        self._alone, self._group = not internal_ddp_handling, group
        settings = self._limits()
        with operation(settings, "collect", group=group, alone=self._alone) as coordinator:
            collected = collect(lambda: self._wish(default_source), coordinator, settings, lockfile=self._lockfile)
        self._collected = dict(collected.paths)
        self.report = collected.report
        return dict(self._collected)

    def load_collected(self, *, verify: Literal["digest"] | None = None) -> None:
        """Load every collected file into its loadable, on every rank; collective.

        A custom hook wins over a transfer hook, which wins over a load hook. What was never collected by this object
        is looked for in `collect_in`. Formats, names and shapes of all loadables are checked on all ranks before the
        first parameter is written on any; what custom hooks refuse shows only when they are called.

        Parameters
        ----------
        verify : "digest", optional
            Compare afterwards what all ranks hold, tensor by tensor (CRC-32). Left out are loadables whose
            `LoadOptions` say `rank_specific`, DTensors, and objects without ``state_dict``.

        Raises
        ------
        LoadError
            On every rank, when a file could not be loaded on any, or ranks hold different values; `NoHook` for a type
            that nobody knows to load, `UnsafeFile` for a pickle that wants more than is allowed.
        PlanMismatch
            Ranks allow pickles different things.
        """
        if verify not in (None, "digest"):
            raise BadRequest(f"verify is 'digest' or None, not {verify!r}")
        from weightferry.loading.load_all import load_all

        settings = self._limits()
        with operation(settings, "load", group=self._group, alone=self._alone) as coordinator:
            load_all(coordinator, lambda: self._loads(settings), verify=verify is not None)

    def _loads(self, settings: Settings) -> dict[str, LoadRequest]:
        from weightferry.loading.load_all import LoadRequest
        from weightferry.loading.options import LoadOptions

        unknown = self.options.keys() - self.loadables.keys()
        if unknown:
            raise BadRequest(f"options for what is no loadable: {', '.join(sorted(unknown))}")
        loads = {}
        for name in (name for name in self.loadables if self.is_loadable(name)):
            options = self.options.get(name, LoadOptions())
            loads[name] = LoadRequest(
                self.loadables[name],
                self._path_of(name),
                self.custom_hooks.get(name),
                replace(options, allow_globals=(*settings.allow_globals, *options.allow_globals)),
            )
        return loads

    def _path_of(self, name: str) -> Path:
        if name in self._collected:
            return self._collected[name]
        if self.collect_in is not None:
            return self.collect_in.expanduser().absolute() / f"{name}{PARAMFILE_EXT}"
        raise BadRequest(f"{name!r} was never collected: call collect_files() first", subject=name)

    def _limits(self) -> Settings:
        settings = self._settings or Settings.from_environ(cache_dir=self._cache_dir)
        if self._settings is not None and self._cache_dir is not None:
            settings = replace(settings, cache_dir=Path(self._cache_dir).expanduser().absolute())
        return settings

    def _wish(self, default_source: SourceLike | None) -> RankRequest:
        names = [name for name in self.loadables if self.is_loadable(name)]
        if self.collect_in is None:
            return RankRequest({name: self._request(name, default_source) for name in names})
        links: dict[str, str] = {}
        for name in names:
            link = safe_path(f"{name}{PARAMFILE_EXT}")
            other = links.setdefault(posixpath.normpath(link), name)
            if other != name:
                raise BadRequest(
                    f"{other!r} and {name!r} would share the link {link} in {self.collect_in}", subject=name
                )
        into = self.collect_in.expanduser().absolute()
        return RankRequest(
            {name: self._request(name, default_source) for name in names}, into=into, suffix=PARAMFILE_EXT
        )

    def _request(self, name: str, default_source: SourceLike | None) -> SourceRequest:
        if name in self.paths:
            path = self.paths[name]
            # Of a chain (zip://m.ckpt::s3://bucket/a.zip) the file is in the middle: it is looked up as a whole.
            if "::" in str(path):
                return SourceRequest.of(path)
            source, filename = self.split_path(path)
            return SourceRequest.of(source, filename, shards=is_index(filename.partition("?")[0]))
        if default_source is not None:
            return SourceRequest.of(default_source, name + PARAMFILE_EXT)
        raise BadRequest(f"{name!r} has no path, and there is no default source", subject=name)
