"""Links to content: asked for once by however many threads, kept until they end or are refused."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from weightferry.origins.signed_urls import SignedUrl, SignedUrlCache


class Hub:
    """Gives another link each time."""

    def __init__(self, query: str = "") -> None:
        self.asked, self.query = 0, query

    def __call__(self) -> SignedUrl:
        self.asked += 1
        return SignedUrl(f"https://cdn/{self.asked}?{self.query}")


def test_it_is_kept() -> None:
    links, hub = SignedUrlCache(), Hub()
    assert links.get("a", hub) is links.get("a", hub)
    assert links.get("b", hub).url == "https://cdn/2?"


def test_a_refused_one_is_asked_for_again_by_the_first_who_says_so() -> None:
    links, hub = SignedUrlCache(), Hub()
    old = links.get("a", hub)
    new = links.get("a", hub, refused=old)
    assert new is not old
    assert links.get("a", hub, refused=old) is new
    assert hub.asked == 2


@pytest.mark.parametrize(
    ("query", "ends"),
    [
        ("", float("inf")),
        ("Expires=1700000000&Signature=x", 1_700_000_000),
        ("X-Amz-Date=20231114T221320Z&X-Amz-Expires=3600", 1_700_003_600),
        ("X-Goog-Date=20231114T221320Z&X-Goog-Expires=60", 1_700_000_060),
        ("X-Amz-Date=20231114T221320Z&X-Amz-Expires=3600&Expires=1700000001", 1_700_000_001),
        ("X-Amz-Date=yesterday&X-Amz-Expires=3600&Expires=soon", float("inf")),
    ],
)
def test_when_it_ends(query: str, ends: float) -> None:
    assert SignedUrl(f"https://cdn/x?{query}").expires == ends


def test_one_that_ends_is_not_used() -> None:
    now = 1_699_999_000.0
    links, hub = SignedUrlCache(lambda: now), Hub("Expires=1700000000")
    assert links.get("a", hub).url == links.get("a", hub).url
    now = 1_699_999_995.0
    links.get("a", hub)
    assert hub.asked == 2


def test_threads_wait_for_one_question() -> None:
    links, hub, all_there = SignedUrlCache(), Hub(), threading.Barrier(8)
    asked = threading.Event()

    def slow() -> SignedUrl:
        asked.wait(10)
        return hub()

    def one(_: int) -> SignedUrl:
        all_there.wait(10)
        return links.get("a", slow)

    with ThreadPoolExecutor(8) as pool:
        found = [pool.submit(one, number) for number in range(8)]
        asked.set()
        assert {each.result().url for each in found} == {"https://cdn/1?"}


def test_an_error_is_not_kept() -> None:
    links, hub = SignedUrlCache(), Hub()

    def refuse() -> SignedUrl:
        raise PermissionError

    with pytest.raises(PermissionError):
        links.get("a", refuse)
    assert links.get("a", hub).url == "https://cdn/1?"


def test_a_link_is_a_secret() -> None:
    assert "cdn" not in repr(SignedUrl("https://cdn/x?Signature=1"))
