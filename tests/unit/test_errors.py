"""Errors: they pickle completely, name rank, host and file, and never contain a secret."""

from __future__ import annotations

import errno
import pickle

import pytest

from weightferry.errors import (
    AccessDenied,
    BadRequest,
    CollectError,
    Failure,
    IntegrityError,
    LeaderLost,
    NoHook,
    NoSpace,
    OriginError,
    PlanMismatch,
    SourceNotFound,
    error_context,
    format_ranks,
    from_failures,
    redact,
    safe_cause,
)
from weightferry.origins.base import TransientOriginError


def classes(base: type[CollectError] = CollectError) -> list[type[CollectError]]:
    found: list[type[CollectError]] = [base]
    for kind in base.__subclasses__():
        found += classes(kind)
    return [kind for kind in found if kind.__module__ in ("weightferry.errors", "weightferry.origins.base")]


def failure(rank: int = 0, message: str = "it broke", kind: str = "OriginError", **options: str) -> Failure:
    return Failure(rank, f"host{rank}", options.pop("phase", "transfer"), kind, message, **options)


@pytest.mark.parametrize("kind", classes(), ids=lambda kind: kind.__name__)
def test_every_class_pickles(kind: type[CollectError]) -> None:
    error = kind("what happened", subject="hf://org/model", failures={3: failure(3, traceback="Traceback ...")})
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert (str(again), again.subject, again.failures) == (str(error), error.subject, error.failures)


def test_retry_after_pickles() -> None:
    error = pickle.loads(pickle.dumps(TransientOriginError("429", subject="x", retry_after=7.0)))
    assert (str(error), error.subject, error.retry_after) == ("429", "x", 7.0)


def test_every_class_is_raised_again_as_itself() -> None:
    ours = [kind for kind in classes() if kind.__module__ == "weightferry.errors"]
    assert len(ours) == 16
    for kind in ours:
        assert type(from_failures({0: failure(kind=kind.__name__)})) is kind


@pytest.mark.parametrize(
    ("kind", "builtin"),
    [
        (BadRequest, ValueError),
        (PlanMismatch, ValueError),
        (SourceNotFound, FileNotFoundError),
        (AccessDenied, PermissionError),
        (OriginError, OSError),
        (NoHook, RuntimeError),
    ],
)
def test_the_builtin_classes_that_users_of_speechbrain_catch(kind: type[Exception], builtin: type[Exception]) -> None:
    assert issubclass(kind, builtin)


class TestFailure:
    @pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
    def test_a_full_disk_or_quota(self, number: int) -> None:
        got = Failure.of(OSError(number, "full"), rank=0, host="node1", phase="transfer")
        assert type(from_failures({0: got})) is NoSpace

    def test_of_an_exception(self) -> None:
        try:
            with error_context("publish", "model.bin"), error_context("transfer", "elsewhere"):
                raise OSError(5, "Input/output error")
        except OSError as error:
            got = Failure.of(error, rank=4, host="node1", phase="link", role="leader of ranks 4-7")
        assert (got.phase, got.subject) == ("transfer", "elsewhere"), "the innermost context wins"
        assert (got.kind, got.message) == ("OSError", "[Errno 5] Input/output error")
        assert "test_of_an_exception" in got.traceback
        assert str(got) == (
            "transfer on node1 (rank 4, leader of ranks 4-7): elsewhere: OSError: [Errno 5] Input/output error"
        )

    def test_a_subject_of_the_error_itself_wins(self) -> None:
        with pytest.raises(IntegrityError) as raised, error_context("transfer", "outer"):
            raise IntegrityError("wrong", subject="inner")
        text = str(Failure.of(raised.value, rank=0, host="h", phase="p"))
        assert text == "transfer on h (rank 0): inner: wrong"

    def test_an_exception_without_text(self) -> None:
        assert Failure.of(KeyboardInterrupt(), rank=0, host="h", phase="p").message == "KeyboardInterrupt"

    def test_secrets_are_removed(self) -> None:
        try:
            raise AccessDenied(
                "GET https://u:pw@h/x?X-Amz-Signature=abcdef Bearer abcdefgh12", subject="https://u:pw@h"
            )
        except AccessDenied as error:
            got = Failure.of(error, rank=0, host="h", phase="p")
        for text in (got.message, got.subject, got.traceback, str(got)):
            assert "pw" not in text
            assert "abcdef" not in text


class TestFromFailures:
    def test_the_first_line(self) -> None:
        error = from_failures({4: failure(4, "HTTP 503", subject="hf://org/m/x.bin", role="leader of ranks 4-7")})
        assert str(error) == "failed in transfer on host4 (rank 4, leader of ranks 4-7): hf://org/m/x.bin: HTTP 503"
        assert type(error) is OriginError
        assert error.subject == "hf://org/m/x.bin"

    def test_a_dead_rank_is_the_cause_of_the_errors_of_its_peers(self) -> None:
        failures = {
            0: failure(0, "Connection closed by peer", "RuntimeError"),
            5: failure(5, "no sign of life for 15 s", "LeaderLost"),
        }
        error = from_failures(failures)
        assert type(error) is LeaderLost
        assert str(error).splitlines()[0].endswith("no sign of life for 15 s")

    def test_the_first_failure_gives_the_class_and_all_are_named(self) -> None:
        failures = {
            2: failure(2, "wrong", "IntegrityError"),
            9: failure(9, "no space", "OSError", phase="publish"),
            **{rank: failure(rank, "wrong", "IntegrityError") for rank in (3, 4, 7)},
        }
        error = from_failures(failures)
        assert type(error) is IntegrityError
        assert str(error).splitlines() == [
            "failed in transfer on host2 (rank 2): wrong",
            "  the same on ranks 3-4, 7",
            "  and in publish on host9 (rank 9): OSError: no space",
        ]
        assert error.failures == failures

    def test_any_other_class_is_named_in_the_text(self) -> None:
        error = from_failures({0: failure(kind="ZeroDivisionError")})
        assert type(error) is CollectError
        assert "ZeroDivisionError: it broke" in str(error)

    def test_transient_errors_become_collect_errors(self) -> None:
        assert type(from_failures({0: failure(kind=TransientOriginError.__name__)})) is CollectError


@pytest.mark.parametrize(
    ("text", "secret"),
    [
        ("token hf_abcdefGHIJ1234 refused", "hf_abcdefGHIJ1234"),
        ("Authorization: Bearer abc.def-ghi_123", "abc.def-ghi_123"),
        ("authorization: basic dXNlcjpwYXNz", "dXNlcjpwYXNz"),
        ("GET https://user:pa55w0rd@host/x", "pa55w0rd"),
        ("GET https://user:pa@55w0rd@host/x", "55w0rd"),
        ("s3://AKIAKEY:secr3t@bucket/x", "secr3t"),
        ("https://h/x?X-Amz-Signature=deadbeef&a=1", "deadbeef"),
        ("https://h/x?a=1&X-Amz-Security-Token=deadbeef", "deadbeef"),
        ("https://h/x?X-Goog-Signature=deadbeef", "deadbeef"),
        ("https://h/x?sv=1&sig=dead%2Fbeef", "dead%2Fbeef"),
        ("https://h/x?Policy=p0licy&Signature=s1gn&Key-Pair-Id=K1", "p0licy"),
        ("https://h/x?access_token=t0ken", "t0ken"),
        ("https://h/x?api_key=k3y", "k3y"),
        ("https://h/x?password=pa55", "pa55"),
    ],
)
def test_redact(text: str, secret: str) -> None:
    assert secret in text
    assert secret not in redact(text)
    assert redact(redact(text)) == redact(text)


@pytest.mark.parametrize("name", ["HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
def test_redact_values_of_the_environment(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "w/hat+ever")
    assert redact("it said w/hat+ever!") == "it said <hidden>!"
    monkeypatch.setenv(name, "")
    assert redact("it said w/hat+ever!") == "it said w/hat+ever!"


@pytest.mark.parametrize(
    "text",
    [
        "hf://org/model@main/config.json",
        "hf://gpt2@main",
        "https://host/a?id=7&page=2",
        "half_a_loaf hf_short",
        "https://host/mail?to=a@b",
        "the bearer of news",
    ],
)
def test_redact_keeps_other_text(text: str) -> None:
    assert redact(text) == text


def test_the_first_line_hides_the_environments_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "planted-token")
    error = Failure.of(OSError("planted-token refused"), rank=0, host="h", phase="resolve")
    assert "planted-token" not in str(from_failures({0: error})) + error.traceback


@pytest.mark.parametrize(
    ("ranks", "text"), [([0], "0"), ([0, 1, 2], "0-2"), ([7, 0, 1, 5, 4], "0-1, 4-5, 7"), ([], "")]
)
def test_format_ranks(ranks: list[int], text: str) -> None:
    assert format_ranks(ranks) == text


def test_a_failure_pickles() -> None:
    assert pickle.loads(pickle.dumps(failure(1))) == failure(1)


def test_safe_cause() -> None:
    harmless = ValueError("no such thing")
    assert safe_cause(harmless) is harmless
    assert safe_cause(ValueError("GET https://user:hunter2@host/x")) is None
    assert safe_cause(None) is None
