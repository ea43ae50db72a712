"""The public errors: a failure on one rank becomes an error of the same class on every rank."""

from __future__ import annotations

import errno
import os
import re
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_SECRET_VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_SECRET_PATTERNS = (
    # Tokens of huggingface.co; their documentation fixes the prefix.
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"\b(?i:bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"),
    # user:password@ of a URL. The password may contain an @. hf://gpt2@main has a revision there, not a password.
    re.compile(r"(?<=://)(?<!\bhf://)[^/?#\s]+(?=@)"),
    # Values in a query: signatures of S3, GCS, Azure and the Hub's CDN, and plain tokens.
    re.compile(
        r"(?i)(?<=[?&])((?:x-amz-|x-goog-)[a-z-]+|signature|sig|policy|key-pair-id|[a-z_-]*token|[a-z_-]*key|password)"
        r"=[^&\s'\"<>]+"
    ),
)
_REDACTED = "<hidden>"


def redact(text: str) -> str:
    """Return `text` without tokens, passwords and signatures.

    Every text that may contain a part of a request passes through this function before it is logged, raised or
    reported.
    """
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 4:
            text = text.replace(value, _REDACTED)
    for pattern in _SECRET_PATTERNS:
        text = pattern.sub(lambda match: f"{match[1]}={_REDACTED}" if match.re.groups else _REDACTED, text)
    return text


_PHASE, _SUBJECT = "_weightferry_phase", "_weightferry_subject"


@contextmanager
def error_context(phase: str = "", subject: str = "") -> Iterator[None]:
    """Attach a phase and a file to any exception that leaves this context; the innermost context wins."""
    try:
        yield
    except Exception as error:
        for attribute, value in ((_PHASE, phase), (_SUBJECT, subject)):
            if value and not getattr(error, attribute, ""):
                setattr(error, attribute, value)
        raise


@dataclass(frozen=True)
class Failure:
    """Describes an error of one rank as a plain value that the ranks exchange through the job's store.

    Attributes
    ----------
    rank, host
        The rank that failed, and its host.
    role
        The role of that rank, such as ``"leader of ranks 4-5"``; empty if it has none.
    phase
        The phase of the operation: agree, resolve, survey, plan, transfer, publish, link or load.
    subject
        The source or file that the error is about; empty if it is about none.
    kind
        Name of the exception's class.
    message
        The exception's text, without secrets.
    traceback
        The traceback on that rank, without secrets.
    """

    rank: int
    host: str
    phase: str
    kind: str
    message: str
    role: str = ""
    subject: str = ""
    traceback: str = ""

    @classmethod
    def of(cls, error: BaseException, *, rank: int, host: str, phase: str, role: str = "") -> Failure:
        """Describe `error`, raised in `phase` on `rank`; the phase that `error_context` attached to it wins."""
        return cls(
            rank=rank,
            host=host,
            phase=getattr(error, _PHASE, "") or phase,
            role=role,
            subject=redact(str(getattr(error, "subject", "") or getattr(error, _SUBJECT, ""))),
            kind=_class_name(error),
            message=redact(str(error) or type(error).__name__),
            traceback=redact("".join(traceback.format_exception(error))),
        )

    def __str__(self) -> str:
        rank = f"rank {self.rank}" + (f", {self.role}" if self.role else "")
        subject = f"{self.subject}: " if self.subject and self.subject not in self.message else ""
        kind = "" if self.kind in _CLASSES else f"{self.kind}: "
        return f"{self.phase} on {self.host} ({rank}): {subject}{kind}{self.message}"


def _class_name(error: BaseException) -> str:
    """Return the name of the error's class; ``NoSpace`` for an `OSError` of a full disk or an exhausted quota."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace.__name__
    return type(error).__name__


class CollectError(Exception):
    """A collect, stage or load failed; every rank of the operation raises an error of the same class.

    A subclass names the cause. `CollectError` itself is raised for any other cause, such as an `OSError`; its text then
    names the class of the original error.

    Parameters
    ----------
    message
        The text of the error: what failed, where, why, and what to do next.
    subject
        The source or file that the error is about; empty if it is about none.
    failures
        By rank, the failure of that rank. Empty before the ranks have exchanged their results.

    Attributes
    ----------
    subject : str
        As above.
    failures : dict[int, Failure]
        As above.
    """

    def __init__(self, message: str, *, subject: str = "", failures: dict[int, Failure] | None = None) -> None:
        super().__init__(message)
        self.subject = subject
        self.failures = dict(failures or {})

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), str(self), self.subject, self.failures)


def _rebuild(kind: type[CollectError], message: str, subject: str, failures: dict[int, Failure]) -> CollectError:
    return kind(message, subject=subject, failures=failures)


class BadRequest(CollectError, ValueError):
    """An argument, a setting or a folder is not valid; the same call fails again until it is corrected.

    Examples: a source that is not a path, a URL or a Hub repository id; a file name that leaves its source with ``..``;
    a loadable without a path and without a default source; two loadables with one link name; a setting out of range; a
    cache folder that another user can write to; a file where a link has to be made.
    """


class PlanMismatch(BadRequest):
    """Ranks made calls that contradict each other.

    Examples: one name in one `collect_in` with two sources; `allow_globals` or ``WEIGHTFERRY_DOMAIN`` with values that
    do not fit together. The text names the ranks and both values. Pass the same values on these ranks, or different
    `collect_in` folders.
    """


class NotDistributed(CollectError, RuntimeError):
    """The launcher started several ranks, but they are not connected.

    Either ``torch.distributed.init_process_group`` was not called before weightferry, or the ranks of a command such as
    ``weightferry stage`` could not connect to each other at ``MASTER_ADDR``. The text says which, and what to add.
    """


class SourceNotFound(CollectError, FileNotFoundError):
    """The origin has no such repository, revision, bucket, folder or file.

    The Hub answers in the same way for a private repository that the token does not cover. Check the name and the
    revision, then the token of the rank that the error names.
    """


class AccessDenied(CollectError, PermissionError):
    """The origin refused access: the token or the credentials of a rank are missing, invalid or without rights.

    For a private repository set ``HF_TOKEN`` or run ``hf auth login``; for a gated one accept its terms on the Hub
    before. For a bucket set the credentials of its store. Ranks that do not read from the origin need no token.
    """


class OriginError(CollectError, OSError):
    """The origin answered with an error, or not as its protocol requires.

    Errors that may pass (HTTP 429, HTTP 5xx, a broken connection) were retried `Settings.retries` times in a row
    without one byte. Check the state of the origin, then call again: the next run continues from the bytes on disk.
    """


class OriginUnreachable(OriginError):
    """No leader can connect to the origin, retries included.

    Causes: the host name does not resolve, the connection is refused or times out, a proxy fails, or ``HF_HUB_OFFLINE``
    is set and no cache has the files. One node with network access is enough for the whole job. Without one, download
    the files to a shared cache beforehand.
    """


class SourceChanged(OriginError):
    """A file at the origin changed after the manifest was made and before all its bytes were read.

    Call again to stage the new version.
    """


class IntegrityError(CollectError):
    """The checksum or size of a file does not match the manifest, and a second download did not help.

    The file at the origin is damaged, or a disk, a proxy or a network device changes bytes. The text names the nodes
    that have wrong bytes. Wrong bytes never get a final name in the cache.
    """


class LeaderLost(CollectError):
    """A rank that other ranks wait for is gone: it ended, never made the call, or sends no heartbeat any more.

    The process was killed (out of memory, for example), its node failed, its network is down, or it does not make this
    collective call. The limits are `Settings.beat_timeout` and, for a rank that has not called yet,
    `Settings.agree_timeout`. The text names rank and host: read the log of that rank and the kernel messages of that
    host. A restarted job continues from the bytes on disk.
    """


class Stalled(CollectError):
    """Nothing moved for `Settings.stall_timeout` seconds: an origin or a rank sends no bytes, though its process lives.

    New connections did not help. Check the origin and the network of the rank that the text names, or raise
    `stall_timeout`. The next run continues from the bytes on disk. The same error ends a wait for another process that
    removes a model from the cache for so long.
    """


class NoSpace(CollectError):
    """A cache has not enough space for the missing files: bytes, inodes, a quota, or the limit `Settings.max_size`.

    Raised before the first byte is downloaded where the sizes are known, else when the file system fills up. Free space
    there, set `max_size` to evict old models (or raise it), or choose another `cache_dir`.
    """


class LoadError(CollectError):
    """A file is complete, but its content could not be loaded into the object.

    The file is damaged or of another format, or its keys, shapes or types do not fit. Every rank checks every file
    before any rank changes a parameter. Load hooks of your own are not covered by this check.
    """


class UnsafeFile(LoadError):
    """A pickle needs more than tensors and plain containers; nothing of it was executed.

    If you trust the file, allow the names that the text lists: with ``LoadOptions(allow_globals=...)`` for one file, or
    with ``WEIGHTFERRY_ALLOW_GLOBALS`` for all. A safetensors file needs no permission.
    """


class NoHook(LoadError, RuntimeError):
    """No load hook is registered for the type of an object, or its custom hook cannot be called.

    Pass a function as ``Pretrainer(custom_hooks=...)``, or register one for the class with `register_checkpoint_hooks`
    and `mark_as_loader`.
    """


_CLASSES: dict[str, type[CollectError]] = {
    kind.__name__: kind
    for kind in (
        CollectError,
        BadRequest,
        PlanMismatch,
        NotDistributed,
        SourceNotFound,
        AccessDenied,
        OriginError,
        OriginUnreachable,
        SourceChanged,
        IntegrityError,
        LeaderLost,
        Stalled,
        NoSpace,
        LoadError,
        UnsafeFile,
        NoHook,
    )
}


_BRIEF_LINES = 8
"""Lines of an error's text on a rank other than rank 0, whose log has the full text."""


def from_failures(failures: dict[int, Failure], operation: str = "", *, brief: bool = False) -> CollectError:
    """Return the error that every rank raises; its class is that of the failure that caused the other failures.

    The cause is a rank that died, else the first of `failures`: rank 0 keeps them in the order of arrival. The first
    line of the text names phase, host, rank, file and cause. One line for each other failed rank follows. The
    tracebacks are in `failures`.

    Parameters
    ----------
    operation
        The operation that failed: ``collect``, ``stage``, ``load``, ...
    brief
        Limit the text to a few lines: rank 0 writes the full text, and the logs of the other ranks stay readable.
    """
    first, *others = sorted(failures.values(), key=lambda failure: failure.kind != LeaderLost.__name__)
    kind = _CLASSES.get(first.kind, CollectError)
    lines = [f"{operation} failed in {first}".lstrip()]
    same = [other for other in others if (other.kind, other.message) == (first.kind, first.message)]
    if same:
        lines.append(f"  the same on ranks {format_ranks([failure.rank for failure in same])}")
    lines += [f"  and in {other}" for other in others if other not in same]
    if brief and len(lines) > _BRIEF_LINES:
        lines[_BRIEF_LINES:] = [f"  and {len(lines) - _BRIEF_LINES} more lines in the log of rank 0"]
    return kind("\n".join(lines), subject=first.subject, failures=failures)


def safe_cause(error: BaseException | None) -> BaseException | None:
    """Return `error` if its traceback contains no secret, else None; `Failure` has the traceback without secrets."""
    if error is None:
        return None
    text = "".join(traceback.format_exception(error))
    return error if redact(text) == text else None


def format_ranks(ranks: list[int]) -> str:
    """Return ranks as text, with ranges: ``0-3, 7``."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
