"""The plan: every piece leaves the origin once at most, and reaches every domain that lacks it."""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping

import pytest

from weightferry.cache.extents import Extents
from weightferry.cache.survey import DomainSurvey
from weightferry.errors import AccessDenied, OriginUnreachable
from weightferry.hashing import Checksum
from weightferry.manifest import File, Manifest, PinnedSource
from weightferry.phases.plan import plan
from weightferry.sources import Source
from weightferry.transfer.pieces import FRAME, MIB, SMALL, cut_pieces, piece_size
from weightferry.transfer.plan import Plan

SOURCE = Source("hf", "org/model")


def file(number: int, size: int | None, *, ranges: bool = True) -> File:
    return File(f"f{number}", size, Checksum("sha256", f"{number:064x}"), ranges=ranges)


def manifest(*sizes: int | None) -> Manifest:
    return Manifest((PinnedSource(SOURCE, "0" * 40, tuple(file(n, size) for n, size in enumerate(sizes))),))


def check(made: Plan, surveys: Mapping[int, DomainSurvey]) -> None:
    """Follow every piece round the ring."""
    for number, piece in enumerate(made.pieces):
        readers = [leader for leader in surveys if number in made.reads[leader]]
        holders = {leader for leader in surveys if number not in made.lacks[leader]}
        assert len(readers) == (not holders), "read once, or never when somebody has it"
        have = holders | set(readers)
        for _ in surveys:
            for leader in surveys:
                if number in made.relayed_to(leader) and made.left(leader) in have:
                    have.add(leader)
        assert have == set(surveys), piece
    for leader in surveys:
        if len(surveys) > 1:
            assert made.relayed_by(leader) == made.relayed_to(made.right(leader))


def test_files_of_two_sources_are_never_in_one_bundle() -> None:
    """Each is read from its own origin, by somebody who reaches that."""
    sources = [Source("hf", "org/a"), Source("https", "https://host")]
    manifest = Manifest(tuple(PinnedSource(source, "1" * 40, (File("x.json", 10),)) for source in sources))
    unreachable = OriginUnreachable("no way")
    surveys = {0: DomainSurvey(unreachable={1: unreachable}), 1: DomainSurvey(unreachable={0: unreachable})}
    decided = plan(manifest, surveys)
    assert [[decided.pieces[number].files for number in decided.reads[leader]] for leader in (0, 1)] == [[(0,)], [(1,)]]


class TestCut:
    @pytest.mark.parametrize("size", [SMALL, 4 * MIB, 4 * MIB + 1, 268 * MIB, 10_000 * MIB])
    @pytest.mark.parametrize("readers", [1, 2, 8, 512])
    def test_pieces_cover_a_file(self, size: int, readers: int) -> None:
        pieces = cut_pieces([file(0, size)], [0], readers)
        assert pieces[0].start == 0
        assert pieces[-1].stop == size
        assert all(before.stop == after.start for before, after in itertools.pairwise(pieces))
        assert all(piece.size <= 64 * MIB for piece in pieces)
        for number, piece in enumerate(pieces):
            frames = list(piece.frames(number))
            assert sum(frame.stop - frame.start for frame in frames) == piece.size
            assert all(frame.start % FRAME == 0 for frame in frames), "mapped: on a page"

    def test_the_size_of_a_piece(self) -> None:
        assert piece_size(268 * MIB, 1) == 32 * MIB
        assert piece_size(268 * MIB, 8) == 4 * MIB
        assert piece_size(10_000 * MIB, 4) == 64 * MIB
        assert piece_size(0, 0) == 4 * MIB

    def test_small_files_travel_together(self) -> None:
        files = [file(n, 1000) for n in range(1000)]
        pieces = cut_pieces(files, range(1000), 2)
        assert len(pieces) == 63
        assert [index for piece in pieces for index in piece.files] == list(range(1000))
        assert all(len(list(piece.frames(0))) == 1 for piece in pieces)

    def test_a_bundle_fits_into_a_frame(self) -> None:
        pieces = cut_pieces([file(n, SMALL - 1) for n in range(10)], range(10), 1)
        assert max(piece.size for piece in pieces) <= FRAME

    def test_files_with_different_holders_share_no_bundle(self) -> None:
        pieces = cut_pieces([file(n, 10) for n in range(6)], range(6), 1, lambda index: index % 2)
        assert [piece.files for piece in pieces] == [(0, 2, 4), (1, 3, 5)]

    @pytest.mark.parametrize("one", [file(0, None), file(0, 100 * MIB, ranges=False)])
    def test_what_comes_only_whole_is_one_piece(self, one: File) -> None:
        (piece,) = cut_pieces([one], [0], 8)
        assert (piece.start, piece.stop) == (0, one.size)


class TestPlan:
    @pytest.mark.parametrize("seed", range(50))
    def test_every_piece_reaches_everybody(self, seed: int) -> None:
        rng = random.Random(seed)
        sizes = [rng.choice([0, 10, SMALL, 9 * MIB, 70 * MIB, None]) for _ in range(rng.randrange(1, 9))]
        surveys = {}
        for leader in sorted(rng.sample(range(64), rng.randrange(1, 9))):
            whole = {n: "" for n in range(len(sizes)) if rng.random() < 0.3}
            parts = {}
            for n, size in enumerate(sizes):
                if n not in whole and size and size >= SMALL and rng.random() < 0.5:
                    parts[n] = Extents([(0, rng.randrange(size)), (rng.randrange(size), size)])
            surveys[leader] = DomainSurvey(whole, parts)
        check(plan(manifest(*sizes), surveys), surveys)

    def test_parts_of_a_file_that_make_a_whole_are_not_read_again(self) -> None:
        """Wherever they begin and end."""
        size = 100 * MIB + 7
        edges = [0, 33 * MIB + 1, 66 * MIB + 4097, size]
        surveys = {n: DomainSurvey({}, {0: Extents([span])}) for n, span in enumerate(itertools.pairwise(edges))}
        made = plan(manifest(size), {**surveys, 3: DomainSurvey()})
        assert not any(made.reads.values())
        assert sum(piece.size for piece in made.pieces) == size

    def test_a_file_in_a_thousand_parts_is_cut_as_one(self) -> None:
        torn = Extents((start, start + 1000) for start in range(0, 64 * MIB, MIB // 16))
        made = plan(manifest(64 * MIB), {0: DomainSurvey({}, {0: torn}), 1: DomainSurvey()})
        assert len(made.pieces) == 16

    def test_4096_leaders(self) -> None:
        surveys = {leader: DomainSurvey() for leader in range(4096)}
        made = plan(manifest(2000 * MIB), surveys)
        assert sum(map(len, made.reads.values())) == len(made.pieces) == 500

    def test_reading_is_shared_evenly(self) -> None:
        surveys = {leader: DomainSurvey() for leader in range(8)}
        made = plan(manifest(*[20 * MIB] * 12), surveys)
        read = [sum(made.pieces[n].size for n in made.reads[leader]) for leader in surveys]
        assert max(read) - min(read) <= 4 * MIB

    def test_of_a_piece_that_is_there_in_part_the_rest_is_read(self) -> None:
        surveys = {0: DomainSurvey(), 1: DomainSurvey(partial_ranges={0: Extents([(0, 3 * MIB)])}), 2: DomainSurvey()}
        made = plan(manifest(4 * MIB), surveys)
        assert [piece.size for piece in made.pieces] == [3 * MIB, MIB]
        assert made.reads == {0: (1,), 1: (), 2: ()}

    def test_in_a_torn_file_who_has_part_of_a_piece_reads_the_rest(self) -> None:
        torn = Extents((start, start + 1000) for start in range(0, 3 * MIB, 4096))
        made = plan(
            manifest(4 * MIB), {0: DomainSurvey(), 1: DomainSurvey(partial_ranges={0: torn}), 2: DomainSurvey()}
        )
        assert made.reads == {0: (), 1: (0,), 2: ()}

    def test_thirds_make_a_whole(self) -> None:
        third = 20 * MIB
        surveys = {n: DomainSurvey(partial_ranges={0: Extents([(n * third, (n + 1) * third)])}) for n in range(3)} | {
            3: DomainSurvey()
        }
        made = plan(manifest(3 * third), surveys)
        assert not any(made.reads.values())
        check(made, surveys)

    def test_one_gateway_reads_all(self) -> None:
        closed = {0: AccessDenied("no token")}
        surveys = {0: DomainSurvey(unreachable=closed), 1: DomainSurvey(), 2: DomainSurvey(unreachable=closed)}
        made = plan(manifest(10, 50 * MIB), surveys)
        assert made.reads[1] == tuple(range(len(made.pieces)))
        assert made.reads[0] == made.reads[2] == ()

    def test_nobody_reaches_it(self) -> None:
        surveys = {0: DomainSurvey(unreachable={0: AccessDenied("no token")})}
        with pytest.raises(AccessDenied, match="no token"):
            plan(manifest(10), surveys)

    def test_nobody_need_reach_what_is_held(self) -> None:
        surveys = {0: DomainSurvey(unreachable={0: AccessDenied("no token")}), 1: DomainSurvey({0: ""})}
        check(plan(manifest(10), surveys), surveys)

    @pytest.mark.parametrize("size", range(2, 10))
    def test_connections_are_made_without_waiting_in_a_circle(self, size: int) -> None:
        surveys = {leader: DomainSurvey() for leader in range(0, 3 * size, 3)}
        made = plan(manifest(100 * MIB), surveys)
        waiting = {leader: made.edges_of(leader) for leader in surveys}
        steps = 0
        while any(waiting.values()):
            ready = {edges[0] for edges in waiting.values() if edges}
            met = {edge for edge in ready if all(waiting[end][:1] == [edge] for end in edge)}
            assert met, f"everybody waits: {waiting}"
            for edge in met:
                for end in edge:
                    waiting[end].pop(0)
            steps += 1
        assert steps <= 3, "not one after the other round the ring"

    def test_no_connection_without_use(self) -> None:
        surveys = {0: DomainSurvey({0: ""}), 1: DomainSurvey({0: ""}), 2: DomainSurvey(), 3: DomainSurvey({0: ""})}
        made = plan(manifest(100 * MIB), surveys)
        assert [made.edges_of(leader) for leader in surveys] == [[], [(1, 2)], [(1, 2)], []]
