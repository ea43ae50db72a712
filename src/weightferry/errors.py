"""Errors that travel: what fails on one rank is raised, with its name, on every rank."""

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
    # What huggingface.co hands out; their documentation fixes the prefix.
    re.compile(r"\bhf_[A-Za-z0-9]{8,}"),
    re.compile(r"\b(?i:bearer|basic)\s+[A-Za-z0-9._~+/=-]{8,}"),
    # user:password@ of a URL; the password may hold an @ itself, and hf://gpt2@main has a revision there.
    re.compile(r"(?<=://)(?<!\bhf://)[^/?#\s]+(?=@)"),
    # Values in a query: signed URLs of S3, GCS, Azure and the Hub's CDN, and plain tokens.
    re.compile(
        r"(?i)(?<=[?&])((?:x-amz-|x-goog-)[a-z-]+|signature|sig|policy|key-pair-id|[a-z_-]*token|[a-z_-]*key|password)"
        r"=[^&\s'\"<>]+"
    ),
)
_HIDDEN = "<hidden>"


def redact(text: str) -> str:
    """Return `text` without tokens, passwords and signatures.

    Every text that may hold a part of a request passes through here before it is logged, raised or reported.
    """
    for name in _SECRET_VARIABLES:
        value = os.environ.get(name, "")
        if len(value) >= 4:
            text = text.replace(value, _HIDDEN)
    for pattern in _SECRET_PATTERNS:
        text = pattern.sub(lambda match: f"{match[1]}={_HIDDEN}" if match.re.groups else _HIDDEN, text)
    return text


_PHASE, _SUBJECT = "_weightferry_phase", "_weightferry_subject"


@contextmanager
def error_context(phase: str = "", subject: str = "") -> Iterator[None]:
    """Note on any exception that leaves this context which phase and which file it belongs to; the innermost wins."""
    try:
        yield
    except Exception as error:
        for attribute, value in ((_PHASE, phase), (_SUBJECT, subject)):
            if value and not getattr(error, attribute, ""):
                setattr(error, attribute, value)
        raise


@dataclass(frozen=True)
class Failure:
    """What went wrong on one rank, as a value that fits through the store.

    Attributes
    ----------
    rank, host
        Who failed.
    role
        What that rank was there, for a reader: ``"leader of ranks 4-5"``, or empty.
    phase
        The phase of the operation: agree, resolve, survey, plan, transfer, publish, link or load.
    subject
        The source or file at hand; empty when it was none in particular.
    kind
        Name of the exception's class.
    message
        The exception's own text, without secrets.
    traceback
        The remote traceback, without secrets.
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
        """Describe `error`, raised in `phase` on `rank`; what `error_context` noted on it is more precise and wins."""
        return cls(
            rank=rank,
            host=host,
            phase=getattr(error, _PHASE, "") or phase,
            role=role,
            subject=redact(str(getattr(error, "subject", "") or getattr(error, _SUBJECT, ""))),
            kind=_kind(error),
            message=redact(str(error) or type(error).__name__),
            traceback=redact("".join(traceback.format_exception(error))),
        )

    def __str__(self) -> str:
        who = f"rank {self.rank}" + (f", {self.role}" if self.role else "")
        named = f"{self.subject}: " if self.subject and self.subject not in self.message else ""
        kind = "" if self.kind in _KINDS else f"{self.kind}: "
        return f"{self.phase} on {self.host} ({who}): {named}{kind}{self.message}"


def _kind(error: BaseException) -> str:
    """Name the class; of a disk or a quota that filled up the one that those who catch it look for."""
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoSpace.__name__
    return type(error).__name__


class CollectError(Exception):
    """A collect, stage or load failed; every rank of the operation raises it with the same content.

    Raised as it is for causes without a class of their own (an `OSError`, say); otherwise one of the classes below.

    Parameters
    ----------
    message
        What happened, for the person who reads the log.
    subject
        The source or file at hand.
    failures
        By rank, what failed there; empty until the error has travelled.

    Attributes
    ----------
    failures : dict[int, Failure]
        By rank, what failed there.
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
    """What was asked for makes no sense: no path and no default source, a name that climbs out, one link for two."""


class PlanMismatch(BadRequest):
    """Ranks contradict each other: one name in one `collect_in` with two sources."""


class NotDistributed(CollectError, RuntimeError):
    """The environment says there are several ranks, but no process group connects them."""


class SourceNotFound(CollectError, FileNotFoundError):
    """The origin has no such repository, revision, bucket, folder or file."""


class AccessDenied(CollectError, PermissionError):
    """The origin wants a token, or another one: private or gated repositories, buckets without rights."""


class OriginError(CollectError, OSError):
    """The origin could not be reached or did not answer as it should, retries included."""


class OriginUnreachable(OriginError):
    """There is no way to the origin from any rank that could use one, retries included."""


class SourceChanged(OriginError):
    """A file at the origin changed between the manifest and the reading of it."""


class IntegrityError(CollectError):
    """Bytes are not the ones the manifest promises, and asking again did not help."""


class LeaderLost(CollectError):
    """A rank that others wait for no longer gives a sign of life."""


class Stalled(CollectError):
    """Bytes stand still: an origin or a rank stopped sending, and asking again did not help."""


class NoSpace(CollectError):
    """The file system of a cache has too few bytes or inodes free for what is missing there, or filled up."""


class LoadError(CollectError):
    """A file is whole, yet its content could not be loaded: damaged, unsafe, of another shape."""


class UnsafeFile(LoadError):
    """A pickle wants more than tensors and plain containers; it was not run."""


class NoHook(LoadError, RuntimeError):
    """Nobody knows how to load an object of this type."""


_KINDS: dict[str, type[CollectError]] = {
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


_BRIEF = 8
"""Lines of an error's text where another rank says all."""


def from_failures(failures: dict[int, Failure], operation: str = "", *, brief: bool = False) -> CollectError:
    """Make the error that every rank raises, of the class of the failure that explains the others.

    That is a rank that died, else the one that comes first in `failures`: rank 0 keeps them in the order in which they
    arrived. The first line of the text names its phase, host, rank, file and cause; the other ranks that failed follow,
    one line each; their tracebacks stay in `failures`.

    Parameters
    ----------
    operation
        What failed: ``collect``, ``stage``, ``load``, ...
    brief
        Say no more than a few lines: one rank of a job says all, and the log of the others stays readable.
    """
    first, *others = sorted(failures.values(), key=lambda failure: failure.kind != LeaderLost.__name__)
    kind = _KINDS.get(first.kind, CollectError)
    lines = [f"{operation} failed in {first}".lstrip()]
    same = [other for other in others if (other.kind, other.message) == (first.kind, first.message)]
    if same:
        lines.append(f"  the same on ranks {format_ranks([f.rank for f in same])}")
    lines += [f"  and in {other}" for other in others if other not in same]
    if brief and len(lines) > _BRIEF:
        lines[_BRIEF:] = [f"  and {len(lines) - _BRIEF} more: the log of rank 0 says all"]
    return kind("\n".join(lines), subject=first.subject, failures=failures)


def safe_cause(error: BaseException | None) -> BaseException | None:
    """Return `error` if its traceback gives no secret away; otherwise None: `Failure` has it, without the secret."""
    if error is None:
        return None
    text = "".join(traceback.format_exception(error))
    return error if redact(text) == text else None


def format_ranks(ranks: list[int]) -> str:
    """Write ranks as people do: ``0-3, 7``."""
    ordered = sorted(ranks)
    runs: list[list[int]] = []
    for rank in ordered:
        if runs and rank == runs[-1][-1] + 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
