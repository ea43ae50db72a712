"""What all ranks want, compared; and who shares a folder."""

from __future__ import annotations

import errno
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import need
from tests.store_answers import answer, known
from weightferry.cluster.coordinator import LocalCoordinator
from weightferry.cluster.domains import FolderIdentity, StorageDomain, group_by_folder
from weightferry.cluster.mounts import is_local, mount_of
from weightferry.cluster.storage_probe import ProbeResult, StorageProbe
from weightferry.errors import BadRequest, CollectError, PlanMismatch
from weightferry.phases.agree import RankProbe, RequestComparison
from weightferry.phases.job_request import JobRequest, RankDescription, RankRequest
from weightferry.settings import Settings
from weightferry.sources import SourceRequest

A, B = SourceRequest.of("org/a", "x.ckpt"), SourceRequest.of("org/b", "x.ckpt")
THIS_MACHINE, OTHER_MACHINE = FolderIdentity("boot0", 1, 1), FolderIdentity("boot1", 1, 1)


def agree(descriptions: dict[int, RankDescription]) -> JobRequest:
    return RequestComparison(range(64)).compare(descriptions)


def described(
    host: str = "h0",
    cache: FolderIdentity = THIS_MACHINE,
    link_folder: FolderIdentity | None = None,
    *,
    copy: bool = False,
    **requests: SourceRequest,
) -> RankDescription:
    return RankDescription(host, f"{host}/0", cache, link_folder, requests, copy=copy)


class TestFolderIdentity:
    def test_the_same_folder_by_any_path(self, tmp_path: Path) -> None:
        (tmp_path / "a").mkdir()
        (tmp_path / "b").mkdir()
        (tmp_path / "link").symlink_to("a")
        place = FolderIdentity.of(tmp_path / "a")
        assert place == FolderIdentity.of(tmp_path / "link") == FolderIdentity.of(tmp_path / "b/../a")
        assert place != FolderIdentity.of(tmp_path / "b")

    def test_numbers_of_another_machine_mean_nothing(self) -> None:
        assert THIS_MACHINE != OTHER_MACHINE
        assert len(group_by_folder({0: THIS_MACHINE, 1: OTHER_MACHINE}, {0: "h0", 1: "h1"})) == 2

    def test_a_folder_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(FileNotFoundError):
            FolderIdentity.of(tmp_path / "no")


def test_the_lowest_rank_leads() -> None:
    places = {3: THIS_MACHINE, 1: THIS_MACHINE, 2: OTHER_MACHINE, 0: OTHER_MACHINE}
    hosts = {0: "h1", 1: "h0", 2: "h1", 3: "h0"}
    domains = group_by_folder(places, hosts)
    assert [(domain.leader, domain.ranks, domain.host) for domain in domains] == [(0, (0, 2), "h1"), (1, (1, 3), "h0")]
    assert [domain.role for domain in domains] == ["leader of ranks 0, 2", "leader of ranks 1, 3"]
    assert StorageDomain(4, (4,), "h", job_ranks=(4,)).role == "leader of its own cache"


class TestAgree:
    def test_the_union_in_the_order_of_ranks(self) -> None:
        job = agree({0: described(x=A), 1: described(x=A, y=B), 2: described("h1", OTHER_MACHINE, z=A)})
        assert job.requests == (A, B)
        assert job.leaders == (0, 2)
        assert (job.ranks, job.nodes) == (3, 2)
        assert job.role(2) == "leader of its own cache"
        assert job.role(1) == ""
        assert job.links == {}

    def test_two_agents_on_one_host_are_two_nodes(self) -> None:
        one, two = (
            RankDescription("h", "h/0", THIS_MACHINE, None, {}),
            RankDescription("h", "h/1", THIS_MACHINE, None, {}),
        )
        assert agree({0: one, 1: two}).nodes == 2
        assert len(agree({0: one, 1: two}).domains) == 1

    def test_one_rank_links_what_all_want_in_a_folder(self) -> None:
        links, others = FolderIdentity("boot0", 1, 7), FolderIdentity("boot0", 1, 8)
        job = agree(
            {
                0: described(link_folder=links, x=A),
                1: described(link_folder=links, y=B),
                2: described(link_folder=others, x=B),
                3: described(z=A),
            }
        )
        assert job.links == {0: {"x": A, "y": B}, 2: {"x": B}}

    def test_a_folder_of_links_has_its_own_domains(self) -> None:
        shared = FolderIdentity("nfs", 1, 7)
        job = agree({0: described("h0", THIS_MACHINE, shared, x=A), 1: described("h1", OTHER_MACHINE, shared, x=A)})
        assert job.leaders == (0, 1)
        assert list(job.links) == [0]

    def test_one_link_with_two_sources_names_both_ranks(self) -> None:
        links = FolderIdentity("boot0", 1, 7)
        with pytest.raises(PlanMismatch) as raised:
            agree(
                {
                    0: described(link_folder=links, y=B),
                    1: described("h1", link_folder=links, x=A),
                    5: described("h2", link_folder=links, x=B),
                }
            )
        text = str(raised.value)
        assert "x is org/a/x.ckpt on rank 1 (h1) and org/b/x.ckpt on rank 5 (h2)" in text

    def test_links_and_copies_in_one_folder(self) -> None:
        links = FolderIdentity("boot0", 1, 7)
        copies, no_copies = (described(link_folder=links, copy=copy, x=A) for copy in (True, False))
        with pytest.raises(PlanMismatch, match="ranks 0, 2 on h0 use one collect_in, but only one"):
            agree({0: copies, 1: copies, 2: no_copies})
        assert agree({0: copies, 1: copies}).copies
        assert not agree({0: no_copies, 1: no_copies}).copies

    def test_no_secret_in_it(self) -> None:
        links = FolderIdentity("boot0", 1, 7)
        one, two = SourceRequest.of("https://u:pa55@h/m?sig=s1gn1"), SourceRequest.of("https://u:pa55@h/m?sig=s1gn2")
        with pytest.raises(PlanMismatch) as raised:
            agree({0: described(link_folder=links, x=one), 1: described(link_folder=links, x=two)})
        assert "pa55" not in str(raised.value)
        assert "s1gn" not in str(raised.value)

    def test_different_sources_in_different_folders_are_fine(self) -> None:
        job = agree(
            {
                0: described(link_folder=THIS_MACHINE, x=A),
                1: described(link_folder=OTHER_MACHINE, x=B),
                2: described(x=B),
            }
        )
        assert job.links == {0: {"x": A}, 1: {"x": B}}


class TestIntroduction:
    def describe(self, wish: RankRequest, cache: Path) -> RankDescription:
        return RankProbe(LocalCoordinator("h"), Settings(cache_dir=cache)).describe(lambda: wish)

    def test_folders_are_made(self, tmp_path: Path) -> None:
        descriptions = self.describe(RankRequest({"x": A}, link_folder=tmp_path / "a/b"), tmp_path / "cache/deep")
        assert descriptions == RankDescription(
            "h", "h", FolderIdentity.of(tmp_path / "cache/deep"), FolderIdentity.of(tmp_path / "a/b"), {"x": A}
        )

    def test_a_cache_that_cannot_be_is_nobody_elses(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        descriptions = self.describe(RankRequest({}), tmp_path / "file" / "cache")
        assert descriptions.cache.inode == 0
        assert descriptions.cache.device == -1

    def test_a_wish_that_fails(self, tmp_path: Path) -> None:
        def wish() -> RankRequest:
            raise BadRequest("no")

        with pytest.raises(BadRequest):
            RankProbe(LocalCoordinator("h"), Settings(cache_dir=tmp_path)).describe(wish)


def test_nobody_wants_anything() -> None:
    assert agree({0: described()}) == JobRequest(
        (), (StorageDomain(0, (0,), "h0", job_ranks=(0,)),), {}, 1, 1, tiers={0: ()}
    )


LUSTRE = [FolderIdentity(f"boot{machine}", 5, machine, local=False) for machine in range(4)]


class TestStorageProbe:
    """Folders that several machines may see: whether they do is tried."""

    def comparison(self, *domains: str) -> tuple[RequestComparison, JobRequest]:
        comparison = RequestComparison(range(4))
        descriptions = {
            rank: replace(described(f"h{rank}", LUSTRE[rank], x=A), domain=name)
            for rank, name in enumerate(domains or ("",) * 4)
        }
        return comparison, comparison.compare(descriptions)

    def test_nothing_is_tried_where_nothing_is_open(self) -> None:
        assert agree({0: described(), 1: described("h1", OTHER_MACHINE)}).probe_token == ""
        assert agree({0: described(cache=LUSTRE[0]), 1: described(cache=LUSTRE[0])}).probe_token == ""
        assert agree({0: described(cache=LUSTRE[0]), 1: described("h1", OTHER_MACHINE)}).probe_token == ""

    def test_two_share_and_two_do_not(self) -> None:
        comparison, job = self.comparison()
        assert job.probe_token
        assert job.probe_caches == (0, 1, 2, 3)
        merge = comparison.merge(
            {0: (ProbeResult(1), None), 1: (ProbeResult(1), None), 2: (ProbeResult(2), None), 3: (ProbeResult(3), None)}
        )
        assert [domain.ranks for domain in merge.domains] == [(0, 1), (2,), (3,)]
        assert merge.leaders == (0, 2, 3)
        assert merge.probe_token == ""
        assert merge.may_show_late

    def test_one_folder_of_links_for_all_machines(self) -> None:
        comparison = RequestComparison(range(4))
        into = [replace(place, inode=9) for place in LUSTRE]
        job = comparison.compare(
            {n: described(f"h{n}", FolderIdentity(f"boot{n}", 1, 1), into[n], x=A) for n in range(4)}
        )
        assert (job.probe_caches, job.probe_link_folders) == ((), (0, 1, 2, 3))
        merge = comparison.merge(dict.fromkeys(range(4), (None, ProbeResult(2))))
        assert list(merge.links) == [0]
        assert merge.leaders == (0, 1, 2, 3)

    def test_a_domain_that_the_user_names_is_compared(self) -> None:
        comparison, _ = self.comparison("a", "a", "b", "c")
        assert comparison.merge(
            {0: (ProbeResult(0), None), 1: (ProbeResult(0), None), 2: (ProbeResult(2), None), 3: (ProbeResult(3), None)}
        ).leaders == (
            0,
            2,
            3,
        )
        with pytest.raises(PlanMismatch, match="these are different cache folders"):
            comparison.merge({n: (ProbeResult(n), None) for n in range(4)})
        with pytest.raises(PlanMismatch, match="see one cache folder, but WEIGHTFERRY_DOMAIN says 'a' and 'b'"):
            comparison.merge(
                {
                    0: (ProbeResult(0), None),
                    1: (ProbeResult(0), None),
                    2: (ProbeResult(0), None),
                    3: (ProbeResult(3), None),
                }
            )

    def test_what_the_user_names_against_what_is_proven(self) -> None:
        with pytest.raises(PlanMismatch, match="see one cache folder"):
            agree({0: replace(described(), domain="a"), 1: replace(described(), domain="b")})
        with pytest.raises(PlanMismatch, match="these are different cache folders"):
            agree({0: replace(described(), domain="a"), 1: replace(described("h1", OTHER_MACHINE), domain="a")})

    def test_locks_that_two_machines_hold_at_once(self) -> None:
        comparison, _ = self.comparison()
        merge = comparison.merge(
            {
                0: (ProbeResult(1), None),
                1: (ProbeResult(1), None),
                2: (ProbeResult(2), None),
                3: (ProbeResult(2, flock_excludes=False), None),
            }
        )
        assert [(domain.ranks, domain.flock_excludes) for domain in merge.domains] == [((0, 1), True), ((2, 3), False)]

    def test_who_finds_the_file_made(self, tmp_path: Path) -> None:
        probe, other = StorageProbe("token", 5.0), StorageProbe("token", 5.0)
        assert probe.probe(tmp_path, 3, lambda: None) == ProbeResult(3)
        assert other.probe(tmp_path, 1, lambda: None) == ProbeResult(3)
        probe.remove_files()
        other.remove_files()
        assert list(tmp_path.iterdir()) == []

    @pytest.mark.parametrize("errno", [0, 38])
    def test_locks_that_exclude_nobody(self, tmp_path: Path, errno: int) -> None:
        need(known(), "the numbers of this machine's system calls are not known here")
        probe = StorageProbe("token", 5.0)
        probe.probe(tmp_path, 3, lambda: None)

        def elsewhere() -> ProbeResult:
            answer("flock", errno)
            return StorageProbe("token", 5.0).probe(tmp_path, 1, lambda: None)

        with ThreadPoolExecutor(1) as thread:
            assert thread.submit(elsewhere).result() == ProbeResult(3, flock_excludes=False)
        probe.remove_files()

    def test_files_that_show_late(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        probe = StorageProbe("token", 30.0)
        probe.probe(tmp_path, 3, lambda: None)
        shows = time.monotonic() + 1.0
        read = Path.read_text

        def late(path: Path, *args: Any, **options: Any) -> str:
            if time.monotonic() < shows:
                raise FileNotFoundError(errno.ENOENT, "young files are hidden", str(path))
            return read(path, *args, **options)

        monkeypatch.setattr(Path, "read_text", late)
        assert probe.probe(tmp_path, 1, lambda: None) == ProbeResult(3)
        probe.remove_files()

    def test_files_that_never_show(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        probe = StorageProbe("token", 0.1)
        probe.probe(tmp_path, 3, lambda: None)
        (tmp_path / ".weightferry-token").write_text("3")  # without its end of line: not written to its end
        with pytest.raises(CollectError, match="WEIGHTFERRY_DOMAIN"):
            probe.probe(tmp_path, 1, lambda: None)
        probe.remove_files()


MOUNTS = """\
21 1 253:0 / / rw,relatime shared:1 - ext4 /dev/vda rw
30 21 0:29 / /home rw - nfs4 server:/home rw
31 21 0:30 / /scratch\\040space rw - lustre mgs:/s rw,localflock
32 30 0:31 / /home/me/local rw - tmpfs tmpfs rw
33 21 0:32 / /fuse rw - fuse.sshfs host: rw
"""


@pytest.mark.parametrize(
    ("folder", "local"),
    [
        ("/", True),
        ("/data", True),
        ("/home/me", False),
        ("/homes", True),
        ("/home/me/local/cache", True),
        ("/scratch space/x", False),
        ("/fuse", False),
    ],
)
def test_which_file_systems_are_local(folder: str, local: bool) -> None:
    assert is_local(Path(folder), MOUNTS) is local


def test_options_of_a_mount() -> None:
    kind, options = mount_of(Path("/scratch space/x"), MOUNTS)
    assert (kind, options) == ("lustre", frozenset({"rw", "localflock"}))
