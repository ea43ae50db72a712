"""Every code block of the documentation and of README.md runs, or is at least checked."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.docs.blocks import PAGES, ROOT, Block, blocks, matches
from tests.docs.checks import check_options, check_python, check_shell
from tests.docs.pages import PageFolder, fill
from weightferry.testing.hub import HubServer

_MARKS = {"python": {"run", "check"}, "console": {"run", "check"}, "bash": {"check"}, "text": {"output", "tree"}}


@pytest.fixture(scope="module")
def hub() -> Iterator[HubServer]:
    with HubServer() as server:
        fill(server)
        yield server


@pytest.fixture
def place(hub: HubServer, tmp_path: Path) -> PageFolder:
    return PageFolder(tmp_path, hub)


def name(page: Path) -> str:
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_block_says_how_it_is_tested(page: Path) -> None:
    for block in blocks(page):
        if block.mark != "diagram" and not block.file:
            assert block.mark in _MARKS.get(block.language, ()), (
                f"{block}: a {block.language} block marked {block.mark!r}"
            )
    fences = sum(line.lstrip().startswith("```") for line in page.read_text().splitlines())
    assert fences == 2 * len(blocks(page)), f"{page}: a fence that is not closed, or that this test does not see"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_what_needs_a_cluster_is_well_formed(page: Path) -> None:
    for block in (one for one in blocks(page) if one.mark == "check"):
        try:
            if block.language == "python":
                check_python(block.text)
            elif block.language == "console":
                for command, _ in block.commands():
                    check_shell(command)
            else:
                check_shell(block.text)
        except Exception as error:
            raise AssertionError(f"{block}: {error}") from error


def runs(page: Path) -> bool:
    return any(block.mark == "run" for block in blocks(page))


@pytest.mark.parametrize("page", [page for page in PAGES if runs(page)], ids=name)
def test_every_other_block_runs(page: Path, place: PageFolder) -> None:
    found = blocks(page)
    for block in found:
        if block.file:
            (place.root / "here" / block.file).write_text(place.mapped(block.text))
    for block in found:
        if block.mark == "run" and block.language == "console":
            run_console(block, place)
    sources = [block for block in found if block.mark == "run" and block.language == "python"]
    if sources:
        printed = dict(zip(map(str, sources), place.python([(str(one), one.text) for one in sources]), strict=True))
        compare_outputs(found, printed)


def run_console(block: Block, place: PageFolder) -> None:
    for command, shown in block.commands():
        code, said = place.console(command)
        # A page that shows a failure shows the shell's prompt with its code: `echo $?` is no command of ours.
        assert matches(shown, said) or (not shown and code == "0"), f"{block}: {command}\nexit code {code}\n{said}"


def compare_outputs(found: list[Block], printed: dict[str, str]) -> None:
    above = ""
    for block in found:
        if block.mark == "run" and block.language == "python":
            above += printed[str(block)]
        elif block.mark == "output":
            assert matches(block.text, above), f"{block}: the blocks above it print\n{above}"
            above = ""


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_every_file_in_a_tree_exists(page: Path) -> None:
    for block in (one for one in blocks(page) if one.mark == "tree"):
        above: list[tuple[int, Path]] = [(-1, ROOT)]
        for line in block.text.splitlines():
            indent, entry = len(line) - len(line.lstrip()), line.split()[0]
            above = [parent for parent in above if parent[0] < indent]
            path = above[-1][1] / entry
            assert path.is_dir() if entry.endswith("/") else path.is_file(), f"{block}: no {path}"
            above.append((indent, path))


def test_the_checks_find_what_is_wrong() -> None:
    """The net itself: a wrong option, target, setting or keyword does not pass."""
    for line in ("weightferry stage a --to-nowhere x", "weightferry stgae a", "make nothing", "WEIGHTFERRY_CACHE=1 a"):
        with pytest.raises(Exception, match=r"(?i)no such|no command|no target"):
            check_shell(line)
    with pytest.raises(AssertionError, match="takes no"):
        check_python("import weightferry\nweightferry.stage('a', branch='b')")
    with pytest.raises(AssertionError, match="has no"):
        check_python("import weightferry\nweightferry.fetch('a')")
    check_options(["submit", "--nodes", "2", "--", "python", "train.py", "--any-option"])
