"""Sources of weights: the text that users write, and its parsed form."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import parse_qsl, unquote, urlencode, urlsplit

from weightferry.errors import BadRequest, redact


class FetchFrom(Enum):
    """The kind of a source, for a text that fits several kinds."""

    LOCAL = 1
    HUGGING_FACE = 2
    URI = 3


class FetchSource(NamedTuple):
    """A source of a given kind, as in SpeechBrain: ``FetchSource(FetchFrom.LOCAL, "org/name")``."""

    FetchFrom: FetchFrom
    path: str

    @classmethod
    def of(cls, given: Any) -> FetchSource | None:
        """Return the source of a given kind if `given` is one, ours or SpeechBrain's; otherwise None.

        Raises
        ------
        BadRequest
            Its kind is none of `FetchFrom`.
        """
        if isinstance(given, FetchSource) and isinstance(given.FetchFrom, FetchFrom):
            return given
        # SpeechBrain's class is a tuple with the same fields, and its kinds have the same names.
        if not (isinstance(given, tuple) and hasattr(given, "FetchFrom") and hasattr(given, "path")):
            return None
        kind = str(getattr(given.FetchFrom, "name", ""))
        if kind not in FetchFrom.__members__:
            raise BadRequest(
                f"the first field of FetchSource must be {', '.join(f'FetchFrom.{each.name}' for each in FetchFrom)}, "
                f"not {given.FetchFrom!r}",
                subject=str(given.path),
            )
        return cls(FetchFrom[kind], str(given.path))


SourceLike = str | Path | FetchSource


@dataclass(frozen=True)
class SourceRequest:
    """A rank's request for one file of a source, or for a whole source.

    Attributes
    ----------
    source : str
        The text that the user wrote.
    kind : FetchFrom or None
        The kind of the source, if the user gave it.
    filename : str
        Path of a file below `source`; if empty, the request is for all of `source`.
    revision : str or None
        Branch, tag or commit on the Hub.
    allow, ignore : tuple of str
        Shell patterns for paths below the source. An empty `allow` allows all paths.
    shards : bool
        Whether the request includes the files that an index of shards names.
    revision_of_hub : bool
        Whether a source that is not on the Hub ignores `revision`; otherwise a revision there is an error.
    """

    source: str
    kind: FetchFrom | None = None
    filename: str = ""
    revision: str | None = None
    allow: tuple[str, ...] = ()
    ignore: tuple[str, ...] = ()
    shards: bool = False
    revision_of_hub: bool = False

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
        revision_of_hub: bool = False,
    ) -> SourceRequest:
        """Return the request for a source as users write it: text, `Path` (always local) or `FetchSource`.

        Raises
        ------
        BadRequest
            The source or the revision is empty, or a text contains a NUL byte.
        """
        kind, of_kind = None, FetchSource.of(source)
        if of_kind is not None:
            kind, source = of_kind
        elif isinstance(source, Path):
            kind = FetchFrom.LOCAL
        text = str(source)
        if not text or "\0" in text + filename:
            raise BadRequest(f"not a source: {text + filename!r} is empty or contains a NUL byte")
        if revision == "":
            raise BadRequest("the revision is empty; use None for the default branch", subject=text)
        return cls(text, kind, filename, revision, _patterns(allow), _patterns(ignore), shards, revision_of_hub)

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return redact(f"{self.source}{revision}" + (f"/{self.filename}" if self.filename else ""))


def _patterns(given: str | Iterable[str] | None) -> tuple[str, ...]:
    return (given,) if isinstance(given, str) else tuple(given or ())


@dataclass(frozen=True)
class Source:
    """A source, parsed.

    Attributes
    ----------
    scheme : str
        ``hf``, ``file``, ``http``, ``https``, or a scheme that fsspec knows.
    root : str
        The repository id, the folder, or the part of the URL above `path`.
    path : str
        A file or folder below `root`; if empty, the whole root.
    revision : str or None
        Branch, tag or commit on the Hub; None for the default branch.
    repo_type : str
        Type of the Hub repository: ``model``, ``dataset`` or ``space``.
    query : str
        Query of an http(s) URL. It may contain a signature, so it is never shown.
    guessed : bool
        Whether the text could also have been the name of a local folder.
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
        """Permanent name of the root: without revision, user name and signature."""
        prefix = "" if self.repo_type == "model" else f"{self.repo_type}s/"
        text = f"{self.scheme}://{prefix}{self.root}" if self.scheme in ("hf", "file") else self.root
        public = [pair for pair in parse_qsl(self.query, keep_blank_values=True) if not _is_secret(pair[0])]
        return _without_user(text) + (f"?{urlencode(public)}" if public else "")

    @property
    def repo_folder(self) -> str:
        """Folder name of the repository in a Hugging Face cache, as by huggingface_hub's `repo_folder_name`."""
        return "--".join([f"{self.repo_type}s", *self.root.split("/")])

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        root, mark, query = self.identity.partition("?")
        return redact(f"{root}{revision}" + (f"/{self.path}" if self.path else "") + mark + query)


def _is_secret(parameter: str) -> bool:
    return redact(f"?{parameter}=xxxxxxxx") != f"?{parameter}=xxxxxxxx" or parameter.lower() in ("expires", "se", "st")


def _without_user(url: str) -> str:
    return re.sub(r"(?<=://)[^/?#\s]+@", "", url)


def parse_source(request: SourceRequest, is_folder: Callable[[str], bool]) -> Source:
    """Parse the text of a source.

    The scheme of a URL decides its kind. A text that can only be a path is a path. Any other text is resolved as in
    SpeechBrain: if a local folder of that name exists, it is this folder; otherwise it is a Hub repository
    (``org/name``, optionally followed by a path in it).

    Parameters
    ----------
    request
        The request of the user.
    is_folder
        Returns whether a local folder of that name exists. It is a parameter so that the result depends on the
        arguments alone.

    Raises
    ------
    BadRequest
        The text is not valid for its kind of source, or a path leaves its source.
    """
    text, kind = request.source, request.kind
    scheme = _scheme(text)
    if scheme == "file" and kind is not FetchFrom.HUGGING_FACE:
        # The file name is a part of the URL, so it is percent-encoded as well.
        return _parse_local(_file_url_path(text), replace(request, filename=unquote(request.filename)))
    if kind is FetchFrom.LOCAL:
        return _parse_local(text, request)
    if kind is FetchFrom.URI and scheme in ("", "hf"):
        raise BadRequest(
            f"{text!r} is not a URL; FetchFrom.URI needs a URL with a scheme other than hf", subject=str(request)
        )
    if kind is FetchFrom.HUGGING_FACE or scheme == "hf":
        return _parse_hub(text, request)
    if scheme in ("http", "https"):
        return _parse_http(text, request)
    if scheme:
        root = re.sub(r"(?<![:/])/+$", "", text)  # removes trailing slashes, but not those of memory://
        return Source(scheme, root, path=safe_path(request.filename) if request.filename else "")
    if text.startswith(("/", "~", "./", "../")) or text in (".", "..") or is_folder(text):
        return _parse_local(text, request)
    return _parse_hub(text, request, guessed=True)


def safe_path(path: str) -> str:
    """Return `path` in normal form, after a check that it stays below its root.

    Raises
    ------
    BadRequest
        The path is empty or absolute, leaves its root with ``..``, or contains a backslash or a NUL byte.
    """
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path:
        raise BadRequest(f"{path!r} must be a relative path without '..', backslashes or NUL bytes", subject=path)
    return "/".join(part for part in parts if part != ".")


def _scheme(text: str) -> str:
    # The scheme of an fsspec chain (zip://a::s3://b/c.zip, simplecache::s3://b/c) is the first one in it. A single
    # letter would be a Windows drive.
    match = re.match(r"([A-Za-z][A-Za-z0-9+.-]+)(?:::[A-Za-z][A-Za-z0-9+.-]+)*://", text)
    return match[1].lower() if match else ""


def _file_url_path(text: str) -> str:
    parts = urlsplit(text)
    if parts.netloc not in ("", "localhost"):
        raise BadRequest(f"{text!r} names a host; write file:///path for a local path", subject=text)
    return unquote(parts.path)


def _parse_local(text: str, request: SourceRequest) -> Source:
    if request.revision and not request.revision_of_hub:
        raise BadRequest(
            f"{text!r} is a local path, so it has no revision {request.revision!r}; remove the revision",
            subject=str(request),
        )
    # `source` itself may lie above the working folder; only the file name must stay below `source`.
    root = str(Path(text).expanduser().absolute())
    return Source("file", root, path=safe_path(request.filename) if request.filename else "")


_REPO_TYPES = {"datasets": "dataset", "spaces": "space", "models": "model"}
# The rule of huggingface.co for both parts of a repository id.
_REPO_PART = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,94}[A-Za-z0-9_])?")


def _parse_hub(text: str, request: SourceRequest, *, guessed: bool = False) -> Source:
    rest = text[len("hf://") :] if _scheme(text) == "hf" else text
    repo_type = "model"
    head, _, tail = rest.partition("/")
    if head in _REPO_TYPES and tail and not guessed:
        repo_type, rest = _REPO_TYPES[head], tail
    # hf://org/name@revision/path. A slash in a revision is written as %2F, as in huggingface_hub.
    match = re.fullmatch(
        r"(?P<repo>[^/@]+/[^/@]+|[^/@]+(?=@|$))(?:@(?P<revision>[^/]+))?(?:/(?P<path>.*))?", rest.rstrip("/")
    )
    repo = match["repo"] if match else ""
    parts = repo.split("/")
    if not match or not all(_REPO_PART.fullmatch(part) and "--" not in part and ".." not in part for part in parts):
        tried = "neither an existing local folder nor" if guessed else "not"
        raise BadRequest(f"{request.source!r} is {tried} a Hub repository id (org/name)", subject=str(request))
    in_text = unquote(match["revision"]) if match["revision"] else None
    if in_text and request.revision and in_text != request.revision:
        raise BadRequest(
            f"{text!r} names revision {in_text!r}, but the call names revision {request.revision!r}; use only one",
            subject=str(request),
        )
    path = "/".join(part for part in (match["path"] or "", request.filename) if part)
    return Source(
        "hf", repo, safe_path(path) if path else "", in_text or request.revision, repo_type=repo_type, guessed=guessed
    )


def _parse_http(text: str, request: SourceRequest) -> Source:
    # The query of a folder's URL, such as a signature, applies to every file in the folder.
    above, mark, query = text.partition("?")
    url = f"{above.rstrip('/')}/{request.filename}{mark}{query}" if request.filename else text
    parts = urlsplit(url)
    folder, _, name = parts.path.rpartition("/")
    if not parts.hostname or not name:
        raise BadRequest(
            f"{redact(url)!r} does not name a file. http(s) cannot list folders: give the URL of each file",
            subject=redact(url),
        )
    if request.revision and not request.revision_of_hub:
        raise BadRequest(
            f"{redact(url)!r} is an http(s) URL, so it has no revision {request.revision!r}; remove the revision",
            subject=redact(url),
        )
    if ".." in PurePosixPath(unquote(parts.path)).parts:
        raise BadRequest(f"{redact(url)!r} contains '..'; write the URL without it", subject=redact(url))
    root = f"{parts.scheme}://{parts.netloc}{folder}"
    return Source(parts.scheme, root, path=safe_path(unquote(name)), query=parts.query)
