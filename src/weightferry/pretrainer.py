"""Pretrainer: collects and loads pretrained files, with the interface of SpeechBrain's class of the same name."""

from __future__ import annotations

import contextlib
import logging
import posixpath
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from weightferry.cluster.call_site import caller_of_package, main_process_guard
from weightferry.cluster.connect import has_other_ranks, process_group_coordinator
from weightferry.cluster.coordinator import Coordinator
from weightferry.collection import PARAMFILE_EXT, CollectArguments, Collection
from weightferry.errors import BadRequest
from weightferry.fetching import FetchConfig, LocalStrategy
from weightferry.origins.shard_index import is_index
from weightferry.report.run_report import RunReport
from weightferry.settings import Settings
from weightferry.sources import FetchSource, SourceLike, SourceRequest, safe_path

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

    from weightferry.loading.load_all import LoadRequest
    from weightferry.loading.options import LoadOptions

logger = logging.getLogger(__name__)


class Pretrainer:
    """Collects pretrained files on every node and loads them on every rank.

    `collect_files` and `load_collected` are collective: every rank calls them, in the same order. One process without a
    process group is a job with one rank.

    In recipes of SpeechBrain only the main process calls `collect_files`: ``run_on_main(pretrainer.collect_files)``,
    ``if if_main_process():``, or inside a function that is decorated with ``main_process_only``. There the call only
    notes its arguments, and `load_collected`, which every rank calls, collects the files on all ranks before it loads.

    Guaranteed: this rank has opened every file that `collect_files` returns, and its size is the one that the origin
    publishes. If the file was transferred, its checksum was verified too. If any rank fails, every rank raises an
    error. Not guaranteed: that a file stays in the cache; another process may delete it later.

    Parameters
    ----------
    collect_in : str or Path, optional
        Folder for the links; it is created with its parents. The link of a loadable is ``NAME.ckpt``. None: no links.
    loadables : mapping of str to object
        By name, the object to load into.
    paths : mapping of str to (str or FetchSource)
        By name, a path: its last part is the name of the file, the rest is a source. An index of shards
        (``org/name/model.safetensors.index.json``) is collected with its shards. A path that ends in a slash
        (``org/name/``) is a complete folder. Loadables without a path come from the default source.
    custom_hooks : mapping of str to callable
        By name, ``hook(object, path)``; it takes precedence over the hooks of the object's class.
    conditions : mapping of str to (bool or callable)
        By name, whether the loadable is collected and loaded. A callable is called each time.
    options : mapping of str to LoadOptions
        By name, options for loading: strictness, renamed keys, the names that its pickle may import.
    lockfile : str or Path, optional
        A file that ``weightferry prefetch`` wrote. `collect_files` reads sizes and checksums from it and sends no
        metadata requests to origins.
    cache_dir : str or Path, optional
        The cache folder of this rank.
    settings : Settings, optional
        All settings; default: from the environment. `cache_dir` takes precedence over the one in `settings`.

    Attributes
    ----------
    collect_in, loadables, paths, custom_hooks, conditions, options
        As above. After the files are collected, `paths` has their local paths, as in SpeechBrain.
    is_local : list of str
        Names of the loadables whose files are collected.
    report : RunReport or None
        The report of the last collection.
    """

    def __init__(
        self,
        collect_in: str | Path | None = None,
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
        self.is_local: list[str] = []
        self.report: RunReport | None = None
        self._settings, self._cache_dir = settings, cache_dir
        self._lockfile = None if lockfile is None else Path(lockfile).expanduser().absolute()
        self._collected: dict[str, Path] = {}
        # By name, the text in `paths` since the file was collected, and what the user had there: None for a file of the
        # default source.
        self._replaced_paths: dict[str, tuple[str, str | FetchSource | None]] = {}
        # What the main process alone asked for, until `load_collected` collects it on every rank.
        self._deferred: Callable[[], CollectArguments] | None = None
        self._single_process = False
        self._group: ProcessGroup | None = None

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(collect_in={self.collect_in}, loadables={list(self.loadables)}, "
            f"collected={list(self._collected)})"
        )

    def set_collect_in(self, path: str | Path | None) -> None:
        """Set the folder for the links."""
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

        A name without a slash is a file in the current folder: ``("./", name)``.
        """
        of_kind = FetchSource.of(path)
        if of_kind is not None:
            source, name = Pretrainer.split_path(of_kind.path)
            return FetchSource(of_kind.FetchFrom, source), name
        text = str(path)
        # Slashes in the query of a URL, such as a signature, do not separate folders.
        path_part, mark, query = text.partition("?") if "://" in text else (text, "", "")
        source, slash, name = path_part.rpartition("/")
        return (source or "/" if slash else "./"), name + mark + query

    def is_loadable(self, name: str) -> bool:
        """Whether the condition of `name` is true, or it has no condition."""
        condition = self.conditions.get(name, True)
        return bool(condition() if callable(condition) else condition)

    def collect_files(
        self,
        default_source: SourceLike | None = None,
        internal_ddp_handling: bool | LocalStrategy = True,
        local_strategy: LocalStrategy | FetchConfig = LocalStrategy.SYMLINK,
        fetch_config: FetchConfig | None = None,
        *,
        group: ProcessGroup | None = None,
    ) -> dict[str, Path]:
        """Copy the file of every loadable to every node, and link it in `collect_in`; collective.

        The signature of SpeechBrain 1.1, ``collect_files(default_source, local_strategy, fetch_config)``, is accepted
        as well, and so are SpeechBrain's own objects.

        Parameters
        ----------
        default_source : str or Path or FetchSource, optional
            The source of the file ``NAME.ckpt``, for loadables without a path.
        internal_ddp_handling : bool
            False: only this process, without coordination with other ranks.
        local_strategy : LocalStrategy
            What is made in `collect_in`: a symbolic link, a real file, or nothing.
        fetch_config : FetchConfig, optional
            How origins and existing files are used. None: every file in `collect_in` is compared with its source.
        group : torch.distributed.ProcessGroup, optional
            The ranks that take part, here and in `load_collected`; None: all ranks of the default process group.

        Returns
        -------
        dict of str to Path
            By name, the absolute local path to load from: the link, or the file itself without `collect_in`. Loadables
            whose condition is false are not in it. Where only the main process of several ranks makes this call (see
            `Pretrainer`), the files are not there yet, and a file whose path in the cache is not known yet is left out.

        Raises
        ------
        CollectError
            The same on every rank: `BadRequest` for an argument of a wrong type, for a loadable without a path and a
            default source, or for a name that cannot be the name of a link; another subclass for an error of the
            origin, the disk or another rank. Where only the main process makes this call, `load_collected` raises it.
        """
        make_arguments = partial(
            CollectArguments.of, default_source, internal_ddp_handling, local_strategy, fetch_config
        )
        guard = main_process_guard(caller_of_package())
        if guard and has_other_ranks():
            return self._defer(make_arguments, guard, group)
        self._deferred, self._single_process, self._group = None, internal_ddp_handling is False, group
        settings = self._effective_settings()
        with process_group_coordinator(settings, "collect", group=group, alone=self._single_process) as coordinator:
            return self._collect(make_arguments, coordinator, settings)

    def _defer(
        self, make_arguments: Callable[[], CollectArguments], guard: str, group: ProcessGroup | None
    ) -> dict[str, Path]:
        """Note the arguments for `load_collected`, and return where the files will be."""

        def check_group() -> CollectArguments:
            if group is not None:
                raise BadRequest(
                    f"collect_files(group=...) was called inside {guard}, where the other ranks do not learn of the "
                    "group; call it on every rank of the group"
                )
            return make_arguments()

        self._deferred, self._single_process, self._group = check_group, False, None
        logger.info("collect_files() was called inside %s: load_collected() will collect the files on all ranks", guard)
        # The files are not there yet, so load_collected must not take those of an earlier call.
        self._collected.clear()
        with contextlib.suppress(BadRequest):  # load_collected raises it, on every rank
            return self._collection(make_arguments).expected_paths()
        return {}

    def _collection(self, make_arguments: Callable[[], CollectArguments]) -> Collection:
        collect_in = None if self.collect_in is None else self.collect_in.expanduser().absolute()
        return Collection(make_arguments, self._requests, collect_in)

    def _collect(
        self, make_arguments: Callable[[], CollectArguments], coordinator: Coordinator, settings: Settings
    ) -> dict[str, Path]:
        collected = self._collection(make_arguments).run(coordinator, settings, self._lockfile)
        self._collected, self.report = dict(collected.paths), collected.report
        for name, path in collected.paths.items():
            self._replaced_paths[name] = str(path), self._source_of(name)
            self.paths[name] = str(path)
            if name not in self.is_local:
                self.is_local.append(name)
        return dict(collected.paths)

    def _collect_deferred(self, coordinator: Coordinator, settings: Settings) -> None:
        """Collect what the main process asked for while the other ranks did not call; collective."""

        def deferred_arguments() -> CollectArguments | None:
            return None if self._deferred is None else self._deferred().for_other_ranks()

        of_main: CollectArguments | None = coordinator.run_on_rank0("agree", deferred_arguments)
        if of_main is not None:
            own = self._deferred if coordinator.rank == 0 else None  # it has the token
            operation, coordinator.operation = coordinator.operation, "collect"
            self._collect(own or (lambda: of_main), coordinator, settings)
            coordinator.operation = operation
        self._deferred = None

    def load_collected(self, *, verify: Literal["digest"] | None = None) -> None:
        """Load every collected file into its loadable, on every rank; collective.

        A custom hook takes precedence over a transfer hook, and a transfer hook over a load hook. For a loadable that
        this object has not collected, the file in `collect_in` is loaded. All ranks check the formats, keys and shapes
        of all loadables before any rank writes a parameter. Errors of custom hooks appear only when they are called.

        If only the main process called `collect_files` (see `Pretrainer`), the files are collected first, with the
        arguments of that call. If only the main process makes this call, it loads alone.

        Parameters
        ----------
        verify : "digest", optional
            Compare the loaded values between ranks, tensor by tensor (CRC-32). Loadables with
            ``LoadOptions(rank_specific=True)``, DTensors, and objects without ``state_dict`` are not compared.

        Raises
        ------
        CollectError
            On every rank, if the files are collected here and that fails; see `collect_files`.
        LoadError
            On every rank, if any rank could not load a file, or ranks hold different values; `NoHook` for a type
            without a hook, `UnsafeFile` for a pickle that imports more than is allowed.
        PlanMismatch
            Ranks have different `LoadOptions.allow_globals` for one loadable.
        """
        if verify not in (None, "digest"):
            raise BadRequest(f"verify must be 'digest' or None, not {verify!r}")
        from weightferry.loading.load_all import load_all

        settings = self._effective_settings()
        # Inside a guard of SpeechBrain the other ranks do not call: SpeechBrain's DDP spreads the values later.
        alone = self._single_process or (bool(main_process_guard(caller_of_package())) and has_other_ranks())
        with process_group_coordinator(settings, "load", group=self._group, alone=alone) as coordinator:
            self._collect_deferred(coordinator, settings)
            load_all(coordinator, lambda: self._load_requests(settings), verify=verify is not None)

    def _load_requests(self, settings: Settings) -> dict[str, LoadRequest]:
        from weightferry.loading.load_all import LoadRequest
        from weightferry.loading.options import LoadOptions

        unknown = self.options.keys() - self.loadables.keys()
        if unknown:
            raise BadRequest(
                f"options for unknown loadables: {', '.join(sorted(unknown))}; add them to loadables first"
            )
        requests = {}
        for name in (name for name in self.loadables if self.is_loadable(name)):
            options = self.options.get(name, LoadOptions())
            requests[name] = LoadRequest(
                self.loadables[name],
                self._path_of(name),
                self.custom_hooks.get(name),
                replace(options, allow_globals=(*settings.allow_globals, *options.allow_globals)),
            )
        return requests

    def _path_of(self, name: str) -> Path:
        if name in self._collected:
            return self._collected[name]
        if self.collect_in is not None:
            return self.collect_in.expanduser().absolute() / f"{name}{PARAMFILE_EXT}"
        raise BadRequest(f"{name!r} was never collected: call collect_files() before load_collected()", subject=name)

    def _effective_settings(self) -> Settings:
        settings = self._settings or Settings.from_environ(cache_dir=self._cache_dir)
        if self._settings is not None and self._cache_dir is not None:
            settings = replace(settings, cache_dir=Path(self._cache_dir).expanduser().absolute())
        return settings

    def _requests(self, arguments: CollectArguments) -> dict[str, SourceRequest]:
        """Return the file of each loadable."""
        names = [name for name in self.loadables if self.is_loadable(name)]
        links: dict[str, str] = {}
        for name in names if self.collect_in is not None else ():
            link = safe_path(f"{name}{PARAMFILE_EXT}")
            other = links.setdefault(posixpath.normpath(link), name)
            if other != name:
                raise BadRequest(
                    f"{other!r} and {name!r} would share the link {link} in {self.collect_in}; rename one of them",
                    subject=name,
                )
        return {name: self._request(name, arguments) for name in names}

    def _source_of(self, name: str) -> str | FetchSource | None:
        """Return the path that the user gave for a loadable; None: it comes from the default source."""
        path = self.paths.get(name)
        replaced, original = self._replaced_paths.get(name, (None, None))
        return original if path == replaced else path

    def _request(self, name: str, arguments: CollectArguments) -> SourceRequest:
        config = arguments.fetch_config
        make = partial(
            SourceRequest.of, revision=config.revision if config else None, revision_of_hub=config is not None
        )
        path = self._source_of(name)
        if path is None and arguments.default_source is not None:
            return make(arguments.default_source, name + PARAMFILE_EXT)
        path = path or self.paths.get(name)  # the file itself, if an earlier call collected it from a default source
        if path is None:
            raise BadRequest(
                f"{name!r} has no path, and there is no default source: add it to paths, or give default_source",
                subject=name,
            )
        # In a chain (zip://m.ckpt::s3://bucket/a.zip) the file name is in the middle: the chain is one source.
        if "::" in str(path):
            return make(path)
        source, filename = self.split_path(path)
        return make(source, filename, shards=is_index(filename.partition("?")[0]))
