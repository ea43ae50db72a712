"""The cache of signed URLs: one request for any number of threads, until the URL expires or is refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from weightferry.origins.signed_urls import SignedUrl, SignedUrlCache


class Hub:
    """Returns a new URL for each request."""

    def __init__(self, query: str = "") -> None:
        self.requests, self.query = 0, query

    def __call__(self) -> SignedUrl:
        self.requests += 1
        return SignedUrl(f"https://cdn/{self.requests}?{self.query}")


def test_a_url_is_cached() -> None:
    urls, hub = SignedUrlCache(), Hub()
    assert urls.get("a", hub) is urls.get("a", hub)
    assert urls.get("b", hub).url == "https://cdn/2?"


def test_only_the_first_refusal_requests_a_new_url() -> None:
    urls, hub = SignedUrlCache(), Hub()
    old = urls.get("a", hub)
    new = urls.get("a", hub, refused=old)
    assert new is not old
    assert urls.get("a", hub, refused=old) is new
    assert hub.requests == 2


@pytest.mark.parametrize(
    ("query", "expires"),
    [
        ("", float("inf")),
        ("Expires=1700000000&Signature=x", 1_700_000_000),
        ("X-Amz-Date=20231114T221320Z&X-Amz-Expires=3600", 1_700_003_600),
        ("X-Goog-Date=20231114T221320Z&X-Goog-Expires=60", 1_700_000_060),
        ("X-Amz-Date=20231114T221320Z&X-Amz-Expires=3600&Expires=1700000001", 1_700_000_001),
        ("X-Amz-Date=yesterday&X-Amz-Expires=3600&Expires=soon", float("inf")),
    ],
)
def test_expiry(query: str, expires: float) -> None:
    assert SignedUrl(f"https://cdn/x?{query}").expires == expires


def test_an_expiring_url_is_not_used() -> None:
    now = 1_699_999_000.0
    urls, hub = SignedUrlCache(lambda: now), Hub("Expires=1700000000")
    assert urls.get("a", hub).url == urls.get("a", hub).url
    now = 1_699_999_995.0
    urls.get("a", hub)
    assert hub.requests == 2


def test_threads_wait_for_one_request() -> None:
    urls, hub, all_started = SignedUrlCache(), Hub(), threading.Barrier(8)
    submitted = threading.Event()

    def slow() -> SignedUrl:
        submitted.wait(10)
        return hub()

    def get_url(_: int) -> SignedUrl:
        all_started.wait(10)
        return urls.get("a", slow)

    with ThreadPoolExecutor(8) as pool:
        pending = [pool.submit(get_url, number) for number in range(8)]
        submitted.set()
        assert {each.result().url for each in pending} == {"https://cdn/1?"}


def test_an_error_is_not_cached() -> None:
    urls, hub = SignedUrlCache(), Hub()

    def refuse() -> SignedUrl:
        raise PermissionError

    with pytest.raises(PermissionError):
        urls.get("a", refuse)
    assert urls.get("a", hub).url == "https://cdn/1?"


def test_the_repr_hides_the_url() -> None:
    assert "cdn" not in repr(SignedUrl("https://cdn/x?Signature=1"))
