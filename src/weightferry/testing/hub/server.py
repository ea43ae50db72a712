"""A server that behaves like the Hugging Face Hub, over a folder or over content in memory.

In tests::

    with HubServer() as hub:
        hub.add_repo("org/model", {"config.json": b"{}", "model.safetensors": weights})
        hf_hub_download("org/model", "model.safetensors", endpoint=hub.url, cache_dir=tmp_path)
        assert hub.content_bytes("model.safetensors") == len(weights)

From a shell, with ``FOLDER/org/model/`` as the model ``org/model``::

    python -m weightferry.testing.hub FOLDER

Only the standard library is used.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weightferry.testing.hub.access import Access
from weightferry.testing.hub.commits import Commit, Library
from weightferry.testing.hub.faults import Faults
from weightferry.testing.hub.files import Files, other_name
from weightferry.testing.hub.records import RequestRecord
from weightferry.testing.hub.repos import Head, Repositories, RepoType, folder_reader, memory_reader
from weightferry.testing.hub.routes import Routes
from weightferry.testing.hub.signed_links import SignedLinks
from weightferry.testing.hub.sockets import Listener, Service
from weightferry.testing.hub.xet import Xet

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class HubOptions:
    """How a server differs from the defaults, which are the Hub's.

    Attributes
    ----------
    cdn_host
        Where links to LFS files lead; empty: to the name that the client used for the Hub, but ``localhost`` for
        ``127.0.0.1`` and the other way round.
    cdn_port
        The port there; 0 takes a free one. It is never the Hub's own: to clients the CDN must be another origin.
    lfs_threshold
        Files of this many bytes and more are in LFS, as are those with a suffix of weights and archives.
    link_lifetime
        Seconds for which a link to an LFS file is valid.
    page_size
        Entries per page of a file listing.
    compress_text
        Whether small text files go out with gzip, in chunks and with no regard to ranges, to clients that accept it.
        The Hub does that.
    private_root
        Whether repositories under the root need a token.
    xet
        Whether LFS files can be read through Xet as well. Clients that know it (`hf_xet`) then do not follow the links.
    sha256s
        As those of `add_repo`, by path below the root.
    """

    cdn_host: str = ""
    cdn_port: int = 0
    lfs_threshold: int = 10 << 20
    link_lifetime: float = 3600
    page_size: int = 1000
    compress_text: bool = False
    private_root: bool = False
    xet: bool = False
    sha256s: Mapping[str, str] = field(default_factory=dict)


class HubServer:
    """A Hub for tests, serving from the moment it is made until `close`.

    Every folder ``root/org/name`` is the model ``org/name`` at revision ``main``, every ``root/datasets/org/name`` a
    dataset, every ``root/spaces/org/name`` a Space. Files that change on disk are a new commit. Hashing is lazy: the
    first question about a repository reads all its files once. Files are sent from where they lie, never held in
    memory.

    Parameters
    ----------
    root
        The folder of repositories; None serves only what is added.
    host, port
        Where to listen; port 0 takes a free one. A second port, for the CDN, is opened at the same address.
    tokens
        The valid tokens, next to those that `add_repo` names. A request with another one is answered 401 whatever it
        asks for, as on the Hub. While no token is known, every token is valid.
    bytes_per_second_per_connection
        The rate of every body; None sends as fast as it goes, some GB/s.
    options
        The rest.

    Attributes
    ----------
    url : str
        What to pass as ``endpoint`` or ``HF_ENDPOINT``. With `host` ``0.0.0.0`` other machines use a name of this one.
    cdn_url : str
        Where links to LFS files lead.
    faults : Faults
        What goes wrong; empty at first.

    Notes
    -----
    As on huggingface.co: LFS files are answered with a redirect (302) to a signed link at another origin, which
    refuses whoever sends an Authorization header along, and whose ETag is not the file's hash; other files with a
    redirect (307) to ``/api/resolve-cache/``, which does not know the size. Metadata of gated repositories is public.
    Anonymous requests for what does not exist get 401, those with a token 404.

    Unlike there: that 401 has an ``X-Error-Code``, since huggingface_hub reads a bare 401 as a missing repository only
    from an https URL. Links at the CDN end in the file's path. Bytes of an old commit are gone (410) when the file was
    overwritten in the folder from which it is served.

    Xet, where `HubOptions.xet` asks for it, is what readers need of it: a token from ``/api/``, then at the CDN's
    address reconstructions (v1) and blocks of chunks, which are neither compressed nor shared between files; every
    64 KiB of a file count 8 bytes more there, and `Fault.corrupt_at` does not show.

    Not here: uploads and everything else that writes, commit history, pull requests, ``/raw/``, search, renamed
    repositories and their redirects, repositories without an organization, rate limits (but see `Fault`), https.
    """

    def __init__(
        self,
        root: Path | str | None = None,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        tokens: Iterable[str] = (),
        bytes_per_second_per_connection: float | None = None,
        options: HubOptions | None = None,
    ) -> None:
        options = options or HubOptions()
        if root is not None and not Path(root).is_dir():
            raise NotADirectoryError(f"no folder {root}")
        self._library = Library(options.lfs_threshold)
        folder = None if root is None else Path(root).absolute()
        for path, sha256 in options.sha256s.items():
            self._library.trust(Path(root or "").absolute() / path, sha256)
        self._repositories = Repositories(folder, self._library, private_root=options.private_root)
        self._access = Access(self._repositories, tokens)
        self._links = SignedLinks(options.link_lifetime)
        with ExitStack() as bound:
            hub = bound.enter_context(closing(Listener((host, port), "hub")))
            cdn = bound.enter_context(closing(Listener((host, options.cdn_port), "cdn")))
            self._open = bound.pop_all()
        name = "127.0.0.1" if host in ("", "0.0.0.0") else host  # noqa: S104 a comparison
        self.url = f"http://{name}:{hub.server_port}"
        self.cdn_url = f"http://{options.cdn_host or other_name(name)}:{cdn.server_port}"
        xet = Xet(self._links) if options.xet else None
        files = Files(self._links, (options.cdn_host, cdn.server_port), xet, compress_text=options.compress_text)
        routes = Routes(self._access, files, xet, options.page_size)
        self._service = Service(routes, bytes_per_second_per_connection)
        hub.start(self._service)
        cdn.start(self._service)

    @property
    def faults(self) -> Faults:
        """What goes wrong."""
        return self._service.faults

    def add_repo(
        self,
        repo_id: str,
        content: Path | str | Mapping[str, bytes],
        *,
        repo_type: RepoType = "model",
        revision: str = "main",
        private: bool = False,
        gated: bool | Literal["auto", "manual"] = False,
        allowed_tokens: Iterable[str] | None = None,
        sha256s: Mapping[str, str] | None = None,
    ) -> None:
        """Add a repository, or move a branch of one that is there.

        What the branch held before stays readable by its commit. `private`, `gated` and `allowed_tokens` are those of
        the whole repository; the last call counts.

        Parameters
        ----------
        repo_id
            As ``org/name``.
        content
            A folder, served as it is at the time of each request, or path to bytes.
        repo_type
            ``model``, ``dataset`` or ``space``.
        revision
            The branch.
        private
            Whether one must be allowed in order to see it; to all others it does not exist.
        gated
            Whether one must be allowed in order to read its files; True is ``"manual"``.
        allowed_tokens
            The tokens with access; None: every valid token.
        sha256s
            By path below the folder, SHA-256 in hexadecimal of files in LFS, believed as long as the file does not
            change: hashing 10 GB takes 6 to 30 s.

        Raises
        ------
        NotADirectoryError
            If `content` names no folder.
        ValueError
            If `repo_id` or a path of `content` cannot be on the Hub, or `sha256s` come with content in memory.
        """
        allowed = None if allowed_tokens is None else frozenset(allowed_tokens)
        if isinstance(content, Mapping):
            if sha256s:
                raise ValueError("content in memory is hashed: sha256s are for folders")
            reader = memory_reader(content)
        elif Path(content).is_dir():
            for path, sha256 in (sha256s or {}).items():
                self._library.trust(Path(content).absolute() / path, sha256)
            reader = folder_reader(Path(content).absolute())
        else:
            raise NotADirectoryError(f"no folder {content}")
        with self._repositories.edit(repo_type, repo_id) as repo:
            repo.private, repo.allowed = private, allowed
            repo.gated = "manual" if gated is True else gated
            repo.set_branch(revision, Head(reader, self._library))
        self._access.tokens |= allowed or set()

    def add_tag(self, repo_id: str, tag: str, *, revision: str = "main", repo_type: RepoType = "model") -> None:
        """Name the commit that `revision` is now; the tag stays there when the branch moves."""
        commit = self._find(repo_id, revision, repo_type)
        with self._repositories.edit(repo_type, repo_id) as repo:
            repo.tags[tag] = commit

    def commit(self, repo_id: str, revision: str = "main", *, repo_type: RepoType = "model") -> str:
        """Return the commit (40 hex digits) that a branch or tag is now; hashes what has not been hashed yet."""
        return self._find(repo_id, revision, repo_type).sha

    @property
    def requests(self) -> list[RequestRecord]:
        """What was asked since the start or the last `reset`, in order, requests in progress included."""
        return self._service.ledger.records()

    @property
    def metadata_requests(self) -> list[RequestRecord]:
        """The requests of kind ``metadata``."""
        return [record for record in self.requests if record.kind == "metadata"]

    def content_bytes(self, path_suffix: str = "") -> int:
        """Return how many bytes of files were sent, those of files with this end of their path only."""
        return sum(record.file_bytes for record in self.requests if record.file.endswith(path_suffix))

    def reset(self) -> None:
        """Forget the requests so far. Faults and repositories stay."""
        self._service.ledger.clear()

    def expire_links(self) -> None:
        """Make every link invalid that was handed out so far; clients get 403 and must ask the Hub again."""
        self._links.expire()

    def hash_all(self) -> None:
        """Hash every file now, so that no first request has to wait for it."""
        for repo in self._repositories.all():
            for head in list(repo.branches.values()):
                head.commit()

    def close(self) -> None:
        """End all connections and threads, also in the middle of an answer. Closing again does nothing."""
        self._open.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<HubServer {self.url}, {len(self.requests)} requests, {self.faults}>"

    def _find(self, repo_id: str, revision: str, repo_type: RepoType) -> Commit:
        repo = self._repositories.find(repo_type, repo_id)
        commit = repo.resolve(revision) if repo else None
        if commit is None:
            raise LookupError(f"no {repo_type} {repo_id} at {revision}")
        return commit
