"""What users write to say where weights come from, and what it means."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from weightferry.errors import BadRequest, redact


class FetchFrom(Enum):
    """Where a source lives, for sources whose text alone could mean two things."""

    LOCAL = 1
    HUGGING_FACE = 2
    URI = 3


class FetchSource(NamedTuple):
    """A source together with where it lives, as in SpeechBrain: ``FetchSource(FetchFrom.LOCAL, "org/name")``."""

    FetchFrom: FetchFrom
    path: str


SourceLike = str | Path | FetchSource


@dataclass(frozen=True)
class SourceRequest:
    """One thing that a rank wants: a file under a name, or a whole source.

    Attributes
    ----------
    source : str
        What the user wrote.
    kind : FetchFrom or None
        Where it lives, when the user said so.
    filename : str
        A file below `source`; empty: `source` itself, whole.
    revision : str or None
        Branch, tag or commit, for the Hub.
    allow, ignore : tuple of str
        Shell patterns on paths below the source; an empty `allow` allows all.
    shards : bool
        Whether the files that an index of shards names come with it.
    """

    source: str
    kind: FetchFrom | None = None
    filename: str = ""
    revision: str | None = None
    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    shards: bool = False

    @classmethod
    def of(
        cls,
        source: SourceLike,
        filename: str = "",
        *,
        revision: str | None = None,
        allow: str | Iterable[str] | None = None,
        ignore: str | Iterable[str] | None = None,
        shards: bool = False,
    ) -> SourceRequest:
        """Make the value from what the interfaces accept: text, `Path` (always local) or `FetchSource`."""
        kind = None
        if isinstance(source, FetchSource):
            kind, source = source.FetchFrom, source.path
        elif isinstance(source, Path):
            kind = FetchFrom.LOCAL
        text = str(source)
        if not text or "\0" in text + filename:
            raise BadRequest(f"not a source: {text + filename!r}")
        if revision == "":
            raise BadRequest("the revision is empty; leave it out for the default branch", subject=text)
        return cls(text, kind, filename, revision, _patterns(allow), _patterns(ignore), shards)

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        return redact(f"{self.source}{at}" + (f"/{self.filename}" if self.filename else ""))


def _patterns(given: str | Iterable[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


@dataclass(frozen=True)
class Source:
    """A source whose meaning is settled.

    Attributes
    ----------
    scheme : str
        ``hf``, ``file``, ``http``, ``https``, or a scheme that fsspec knows.
    root : str
        The repository id, the folder, or the URL above `path`.
    path : str
        A file or folder below `root`; empty: all of it.
    revision : str or None
        Branch, tag or commit, for the Hub; None is the default branch.
    repo_type : str
        ``model``, ``dataset`` or ``space``, for the Hub.
    query : str
        The query of an http(s) URL. It may hold a signature: never shown.
    guessed : bool
        The text could have been a local folder too.
    """

    scheme: str
    root: str
    path: str = ""
    revision: str | None = None
    repo_type: str = "model"
    query: str = field(default="", repr=False)
    guessed: bool = field(default=False, compare=False)

    @property
    def identity(self) -> str:
        """The text that names the root for ever: no revision, no user, no signature."""
        prefix = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        text = f"{self.scheme}://{prefix}{self.root}" if self.scheme in ("hf", "file") else self.root
        kept = [pair for pair in parse_qsl(self.query, keep_blank_values=True) if not _is_secret(pair[0])]
        return _without_user(text) + (f"?{urlencode(kept)}" if kept else "")

    @property
    def repo_folder(self) -> str:
        """The name of a repository's folder in a Hugging Face cache: huggingface_hub's `repo_folder_name`."""
        return "--".join([f"{self.repo_type}s", *self.root.split("/")])

    def __str__(self) -> str:
        at = f"@{self.revision}" if self.revision else ""
        root, mark, query = self.identity.partition("?")
        return redact(f"{root}{at}" + (f"/{self.path}" if self.path else "") + mark + query)


def _is_secret(parameter: str) -> bool:
    return redact(f"?{parameter}=xxxxxxxx") != f"?{parameter}=xxxxxxxx" or parameter.lower() in ("expires", "se", "st")


def _without_user(url: str) -> str:
    return re.sub(r"(?<=://)[^/?#\s]+@", "", url)


def parse_source(request: SourceRequest, is_folder: Callable[[str], bool]) -> Source:
    """Decide what the text of a source means.

    Text with a scheme means what it says. Text that can only be a path is a path. The rest is resolved as SpeechBrain
    does: an existing local folder wins, otherwise it names a Hub repository (``org/name``, and what follows is a path
    in it).

    Parameters
    ----------
    ask
        What the user wrote.
    is_folder
        Whether a local folder of that name exists; injected, so that this stays a function of its arguments.

    Raises
    ------
    BadRequest
        The text makes no sense in the place it says it lives, or a path climbs out of its source.
    """
    text, kind = request.source, request.kind
    scheme = _scheme(text)
    if scheme == "file" and kind is not FetchFrom.HUGGING_FACE:
        # The file's name is a part of the URL, and quoted like the rest of it.
        return _local(_file_url_path(text), replace(request, filename=unquote(request.filename)))
    if kind is FetchFrom.LOCAL:
        return _local(text, request)
    if kind is FetchFrom.URI and scheme in ("", "hf"):
        raise BadRequest(f"{text!r} is not a URL", subject=str(request))
    if kind is FetchFrom.HUGGING_FACE or scheme == "hf":
        return _hub(text, request)
    if scheme in ("http", "https"):
        return _http(text, request)
    if scheme:
        root = re.sub(r"(?<![:/])/+$", "", text)  # but not those of memory://
        return Source(scheme, root, path=safe_path(request.filename) if request.filename else "")
    if text.startswith(("/", "~", "./", "../")) or text in (".", "..") or is_folder(text):
        return _local(text, request)
    return _hub(text, request, guessed=True)


def safe_path(path: str) -> str:
    """Return `path` if it stays below its root, in normal form.

    Raises
    ------
    BadRequest
        It is absolute, climbs out, or holds what no file system below a cache should see.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise BadRequest(f"{path!r} climbs out of its source, or is no path below one", subject=path)
    return "/".join(part for part in parts if part != ".")


def _scheme(text: str) -> str:
    # fsspec chains (zip://a::s3://b/c.zip, simplecache::s3://b/c) keep the first scheme; one letter would be a Windows
    # drive.
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)(?:::[A-Za-z][A-Za-z0-9+.-]+)*://", text)
    return match[1].lower() if match else ""


def _file_url_path(text: str) -> str:
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise BadRequest(f"{text!r} names another host; use file:///path", subject=text)
    return unquote(parts.path)


def _local(text: str, request: SourceRequest) -> Source:
    if request.revision:
        raise BadRequest(f"{text!r} is a local path: it has no revision {request.revision!r}", subject=str(request))
    # A local file may well lie above the working folder; only its name below `source` must stay below.
    root = str(Path(text).expanduser().absolute())
    return Source("file", root, path=safe_path(request.filename) if request.filename else "")


_REPO_TYPES = {"datasets": "dataset", "spaces": "space", "models": "model"}
# The rules of huggingface.co for both parts of a repository id.
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


def _hub(text: str, request: SourceRequest, *, guessed: bool = False) -> Source:
    rest = text[len("hf://") :] if _scheme(text) == "hf" else text
    repo_type = "model"
    head, _, tail = rest.partition("/")
    if head in _REPO_TYPES and tail and not guessed:
        repo_type, rest = _REPO_TYPES[head], tail
    # hf://org/name@revision/path; a revision that holds a slash is written with %2F, as huggingface_hub does.
    match = re.fullmatch(
        r"(?P<repo>[^/@]+/[^/@]+|[^/@]+(?=@|$))(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?", rest.rstrip("/")
    )
    repo = match["repo"] if match else ""
    if not match or not all(_REPO_PART.fullmatch(p) and "--" not in p and ".." not in p for p in repo.split("/")):
        also = ": no such local folder, and not a Hub repository id" if guessed else ": not a Hub repository id"
        raise BadRequest(f"{request.source!r}{also} (org/name)", subject=str(request))
    written = unquote(match["revision"]) if match["revision"] else None
    if written and request.revision and written != request.revision:
        raise BadRequest(
            f"{text!r} names revision {written!r}, the call names {request.revision!r}", subject=str(request)
        )
    path = "/".join(part for part in (match["path"] or "", request.filename) if part)
    return Source(
        "hf", repo, safe_path(path) if path else "", written or request.revision, repo_type=repo_type, guessed=guessed
    )


def _http(text: str, request: SourceRequest) -> Source:
    # The query of a folder's URL (a signature, say) goes with every file in it.
    above, mark, query = text.partition("?")
    url = f"{above.rstrip('/')}/{request.filename}{mark}{query}" if request.filename else text
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    if not parts.hostname or not name:
        raise BadRequest(f"{redact(url)!r} names no file; an http(s) folder cannot be listed", subject=redact(url))
    if request.revision:
        raise BadRequest(f"{redact(url)!r} has no revision {request.revision!r}", subject=redact(url))
    if ".." in PurePosixPath(unquote(parts.path)).parts:
        raise BadRequest(f"{redact(url)!r} climbs out with '..'", subject=redact(url))
    root = f"{parts.scheme}://{parts.netloc}{folder}"
    return Source(parts.scheme, root, path=safe_path(unquote(name)), query=parts.query)
