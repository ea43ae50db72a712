"""A server that behaves like the Hugging Face Hub; it serves a folder, or content in memory.

In tests::

    with HubServer() as hub:
        hub.add_repo("org/model", {"config.json": b"{}", "model.safetensors": weights})
        hf_hub_download("org/model", "model.safetensors", endpoint=hub.url, cache_dir=tmp_path)
        assert hub.content_bytes("model.safetensors") == len(weights)

From a shell, where ``FOLDER/org/model/`` is the model ``org/model``::

    python -m weightferry.testing.hub FOLDER

It uses only the standard library.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from weightferry.testing.hub.access import Access
from weightferry.testing.hub.commits import Commit, CommitBuilder
from weightferry.testing.hub.faults import Faults
from weightferry.testing.hub.files import Files, alternative_host_name
from weightferry.testing.hub.http_server import Listener, ServerState
from weightferry.testing.hub.repositories import Branch, Repositories, RepoType, folder_reader, memory_reader
from weightferry.testing.hub.request_log import RequestRecord
from weightferry.testing.hub.routes import Routes
from weightferry.testing.hub.signed_urls import SignedUrls
from weightferry.testing.hub.xet import Xet

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True)
class HubOptions:
    """Options of a server; the defaults are the Hub's behaviour.

    Attributes
    ----------
    cdn_host
        Host in the URLs of LFS files; empty: the name that the client uses for the Hub, but ``localhost`` for
        ``127.0.0.1`` and ``127.0.0.1`` for ``localhost``.
    cdn_port
        Port of the CDN; 0: a free port. It is never the Hub's port: for clients, the CDN must be another origin.
    lfs_threshold
        Files of this many bytes or more are in LFS, and so are files with a suffix of weights or archives.
    link_lifetime
        Seconds until the URL of an LFS file expires.
    page_size
        Entries per page of a file listing.
    compress_text
        Whether small text files are sent with gzip, in chunks and without regard to ranges, to clients that accept it.
        The Hub does so.
    private_root
        Whether repositories below the root need a token.
    xet
        Whether to serve LFS files through Xet as well. Clients with `hf_xet` then do not use the signed URLs.
    sha256s
        As in `add_repo`, by path below the root.
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
    """A Hub for tests; it serves from its construction until `close`.

    Every folder ``root/org/name`` is the model ``org/name`` at revision ``main``, every ``root/datasets/org/name`` a
    dataset, every ``root/spaces/org/name`` a Space. When files change on disk, the branch has a new commit. The first
    request for a repository reads and hashes all its files. The server sends files from disk and does not hold them in
    memory.

    Parameters
    ----------
    root
        The folder of repositories; None: serve only added repositories.
    host, port
        The address to listen on; port 0: a free port. The CDN has a second port on the same host.
    tokens
        The valid tokens; `add_repo` adds more. As on the Hub, every request with another token gets 401. While no token
        is known, every token is valid.
    bytes_per_second_per_connection
        The rate of every body; None: no limit, some GB/s.
    options
        More options.

    Attributes
    ----------
    url : str
        The value for ``endpoint`` or ``HF_ENDPOINT``. With host ``0.0.0.0``, other machines use a name of this machine
        instead.
    cdn_url : str
        The URL of the CDN, which serves LFS files.
    faults : Faults
        The faults to inject; empty at first.

    Notes
    -----
    As on huggingface.co: a request for an LFS file is redirected (302) to a signed URL at another origin. That origin
    refuses requests with an Authorization header, and its ETag is not the file's hash. A request for any other file is
    redirected (307) to ``/api/resolve-cache/``, without the size. The metadata of gated repositories is public. A
    request for a missing repository gets 401 without a token and 404 with one.

    Unlike huggingface.co: that 401 has an ``X-Error-Code``, since huggingface_hub takes a 401 without it as a missing
    repository only from an https URL. URLs at the CDN end with the file's path. The content of an old commit is gone
    (410) if the file was overwritten in the served folder.

    With `HubOptions.xet`, the server has the part of Xet that readers need: a token from ``/api/``, and at the CDN's
    address reconstructions (v1) and blocks of chunks. The chunks are neither compressed nor shared between files. Every
    64 KiB of a file count 8 bytes more in `content_bytes`, and `Fault.corrupt_at` has no effect.

    Not supported: uploads and other writes, commit history, pull requests, ``/raw/``, search, renamed repositories and
    their redirects, repositories without an organization, rate limits (but see `Fault`), https.
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
            raise NotADirectoryError(f"{root} is not a folder")
        self._commit_builder = CommitBuilder(options.lfs_threshold)
        folder = None if root is None else Path(root).absolute()
        for path, sha256 in options.sha256s.items():
            self._commit_builder.set_sha256(Path(root or "").absolute() / path, sha256)
        self._repositories = Repositories(folder, self._commit_builder, private_root=options.private_root)
        self._access = Access(self._repositories, tokens)
        self._signed_urls = SignedUrls(options.link_lifetime)
        with ExitStack() as listeners:
            hub = listeners.enter_context(closing(Listener((host, port), "hub")))
            cdn = listeners.enter_context(closing(Listener((host, options.cdn_port), "cdn")))
            self._listeners = listeners.pop_all()
        name = "127.0.0.1" if host in ("", "0.0.0.0") else host  # noqa: S104 a comparison
        self.url = f"http://{name}:{hub.server_port}"
        self.cdn_url = f"http://{options.cdn_host or alternative_host_name(name)}:{cdn.server_port}"
        xet = Xet(self._signed_urls) if options.xet else None
        files = Files(self._signed_urls, (options.cdn_host, cdn.server_port), xet, compress_text=options.compress_text)
        routes = Routes(self._access, files, xet, options.page_size)
        self._state = ServerState(routes, bytes_per_second_per_connection)
        hub.start(self._state)
        cdn.start(self._state)

    @property
    def faults(self) -> Faults:
        """The faults to inject."""
        return self._state.faults

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
        """Add a repository, or give a branch of an existing repository new content.

        The old content of the branch stays readable by its commit. `private`, `gated` and `allowed_tokens` apply to the
        whole repository; the last call decides.

        Parameters
        ----------
        repo_id
            As ``org/name``.
        content
            A folder, served in its state at the time of each request; or bytes by path.
        repo_type
            ``model``, ``dataset`` or ``space``.
        revision
            The branch.
        private
            Whether only `allowed_tokens` may see it; for all other requests it does not exist.
        gated
            Whether only `allowed_tokens` may read its files; True means ``"manual"``.
        allowed_tokens
            The tokens with access; None: every valid token.
        sha256s
            By path below the folder, the SHA-256 (hexadecimal) of LFS files. The server uses it until the file changes,
            and does not hash the file: hashing 10 GB takes 6 to 30 s.

        Raises
        ------
        NotADirectoryError
            `content` is not a folder.
        ValueError
            `repo_id` or a path of `content` is not valid on the Hub, or `sha256s` is given with content in memory.
        """
        allowed = None if allowed_tokens is None else frozenset(allowed_tokens)
        if isinstance(content, Mapping):
            if sha256s:
                raise ValueError("sha256s are for folders; content in memory is always hashed")
            reader = memory_reader(content)
        elif Path(content).is_dir():
            for path, sha256 in (sha256s or {}).items():
                self._commit_builder.set_sha256(Path(content).absolute() / path, sha256)
            reader = folder_reader(Path(content).absolute())
        else:
            raise NotADirectoryError(f"{content} is not a folder")
        with self._repositories.edit(repo_type, repo_id) as repo:
            repo.private, repo.allowed = private, allowed
            repo.gated = "manual" if gated is True else gated
            repo.set_branch(revision, Branch(reader, self._commit_builder))
        self._access.tokens |= allowed or set()

    def add_tag(self, repo_id: str, tag: str, *, revision: str = "main", repo_type: RepoType = "model") -> None:
        """Tag the current commit of `revision`; the tag stays on that commit when the branch changes."""
        commit = self._find(repo_id, revision, repo_type)
        with self._repositories.edit(repo_type, repo_id) as repo:
            repo.tags[tag] = commit

    def commit(self, repo_id: str, revision: str = "main", *, repo_type: RepoType = "model") -> str:
        """Return the current commit (40 hex digits) of a branch or tag; hash the files that are new."""
        return self._find(repo_id, revision, repo_type).sha

    @property
    def requests(self) -> list[RequestRecord]:
        """All requests since the start or the last `reset`, in order, with the requests in progress."""
        return self._state.request_log.records()

    @property
    def metadata_requests(self) -> list[RequestRecord]:
        """The requests of kind ``metadata``."""
        return [record for record in self.requests if record.kind == "metadata"]

    def content_bytes(self, path_suffix: str = "") -> int:
        """Return the number of sent bytes of files whose path ends with `path_suffix`."""
        return sum(record.file_bytes for record in self.requests if record.file.endswith(path_suffix))

    def reset(self) -> None:
        """Clear the log of requests. Faults and repositories stay."""
        self._state.request_log.clear()

    def expire_links(self) -> None:
        """Invalidate all signed URLs so far; clients get 403 and must request new URLs from the Hub."""
        self._signed_urls.expire()

    def hash_all(self) -> None:
        """Hash every file now, so that no request waits for a hash."""
        for repo in self._repositories.all():
            for branch in list(repo.branches.values()):
                branch.commit()

    def close(self) -> None:
        """Close all connections and end all threads, also during a response. A second call does nothing."""
        self._listeners.close()

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
