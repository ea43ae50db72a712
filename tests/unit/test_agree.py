"""What all ranks want, compared; and who shares a folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from weightferry.cluster.agree import Agreed, Introduction, Wish, agree
from weightferry.cluster.control import Solo
from weightferry.cluster.domains import Domain, Place, group
from weightferry.errors import BadRequest, PlanMismatch
from weightferry.sources import Ask

A, B = Ask.of("org/a", "x.ckpt"), Ask.of("org/b", "x.ckpt")
HERE, THERE = Place("boot0", 1, 1), Place("boot1", 1, 1)


def says(host: str = "h0", cache: Place = HERE, into: Place | None = None, **asks: Ask) -> Introduction:
    return Introduction(host, f"{host}/0", cache, into, asks)


class TestPlaces:
    def test_the_same_folder_by_any_path(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        (tmp_path / "link").symlink_to("a")
        place = Place.of(tmp_path / "a")
        assert place == Place.of(tmp_path / "link") == Place.of(tmp_path / "b/../a")
        assert place != Place.of(tmp_path / "b")

    def test_numbers_of_another_machine_mean_nothing(self) -> None:
        assert HERE != THERE
        assert len(group({0: HERE, 1: THERE}, {0: "h0", 1: "h1"})) == 2

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            Place.of(tmp_path / "no")


def test_the_lowest_rank_leads() -> None:
    places = {3: HERE, 1: HERE, 2: THERE, 0: THERE}
    hosts = {0: "h1", 1: "h0", 2: "h1", 3: "h0"}
    domains = group(places, hosts)
    assert domains == (Domain(0, (0, 2), "h1"), Domain(1, (1, 3), "h0"))
    assert [domain.role for domain in domains] == ["leader of ranks 0, 2", "leader of ranks 1, 3"]
    assert Domain(4, (4,), "h").role == "leader of its own cache"


class TestAgree:
    def test_the_union_in_the_order_of_ranks(self) -> None:
        agreed = agree({0: says(x=A), 1: says(x=A, y=B), 2: says("h1", THERE, z=A)})
        assert agreed.asks == (A, B)
        assert agreed.leaders == (0, 2)
        assert (agreed.ranks, agreed.nodes) == (3, 2)
        assert agreed.role(2) == "leader of its own cache"
        assert agreed.role(1) == ""
        assert agreed.links == {}

    def test_two_agents_on_one_host_are_two_nodes(self) -> None:
        one, two = Introduction("h", "h/0", HERE, None, {}), Introduction("h", "h/1", HERE, None, {})
        assert agree({0: one, 1: two}).nodes == 2
        assert len(agree({0: one, 1: two}).domains) == 1

    def test_one_rank_links_what_all_want_in_a_folder(self) -> None:
        links, others = Place("boot0", 1, 7), Place("boot0", 1, 8)
        agreed = agree({0: says(into=links, x=A), 1: says(into=links, y=B), 2: says(into=others, x=B), 3: says(z=A)})
        assert agreed.links == {0: {"x": A, "y": B}, 2: {"x": B}}

    def test_a_folder_of_links_has_its_own_domains(self) -> None:
        shared = Place("nfs", 1, 7)
        agreed = agree({0: says("h0", HERE, shared, x=A), 1: says("h1", THERE, shared, x=A)})
        assert agreed.leaders == (0, 1)
        assert list(agreed.links) == [0]

    def test_one_link_with_two_sources_names_both_ranks(self) -> None:
        links = Place("boot0", 1, 7)
        with pytest.raises(PlanMismatch) as raised:
            agree({0: says(into=links, y=B), 1: says("h1", into=links, x=A), 5: says("h2", into=links, x=B)})
        text = str(raised.value)
        assert "x is org/a/x.ckpt on rank 1 (h1) and org/b/x.ckpt on rank 5 (h2)" in text

    def test_no_secret_in_it(self) -> None:
        links = Place("boot0", 1, 7)
        one, two = Ask.of("https://u:pa55@h/m?sig=s1gn1"), Ask.of("https://u:pa55@h/m?sig=s1gn2")
        with pytest.raises(PlanMismatch) as raised:
            agree({0: says(into=links, x=one), 1: says(into=links, x=two)})
        assert "pa55" not in str(raised.value)
        assert "s1gn" not in str(raised.value)

    def test_different_sources_in_different_folders_are_fine(self) -> None:
        agreed = agree({0: says(into=HERE, x=A), 1: says(into=THERE, x=B), 2: says(x=B)})
        assert agreed.links == {0: {"x": A}, 1: {"x": B}}


class TestIntroduction:
    def introduce(self, wish: Wish, cache: Path) -> Introduction:
        return Introduction.maker(lambda: wish, cache, Solo("h")).introduce()

    def test_folders_are_made(self, tmp_path: Path) -> None:
        said = self.introduce(Wish({"x": A}, into=tmp_path / "a/b"), tmp_path / "cache/deep")
        assert said == Introduction("h", "h", Place.of(tmp_path / "cache/deep"), Place.of(tmp_path / "a/b"), {"x": A})

    def test_a_cache_that_cannot_be_is_nobody_elses(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        said = self.introduce(Wish({}), tmp_path / "file" / "cache")
        assert said.cache.inode == 0
        assert said.cache.device == -1

    def test_a_wish_that_fails(self, tmp_path: Path) -> None:
        def wish() -> Wish:
            raise BadRequest("no")

        with pytest.raises(BadRequest):
            Introduction.maker(wish, tmp_path, Solo("h")).introduce()


def test_nobody_wants_anything() -> None:
    assert agree({0: says()}) == Agreed((), (Domain(0, (0,), "h0"),), {}, 1, 1)
