"""The command alone on odd input: nothing of the user's is lost, and wrong calls say so before anything moves."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner, Result

import weightferry
from weightferry.cli import main
from weightferry.origins.filesystem import FilesystemOrigin
from weightferry.settings import Settings
from weightferry.sources import Source


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "deep").mkdir(parents=True)
    (folder / "w.bin").write_text("weights")
    (folder / "deep" / "c.json").write_text("{}")
    return folder


def stage(*arguments: str | Path) -> Result:
    return CliRunner().invoke(main, ["stage", *map(str, arguments)])


def test_links_under_their_own_paths(source: Path, tmp_path: Path) -> None:
    done = stage(source, "--to", tmp_path / "to", "--cache-dir", tmp_path / "cache")
    assert done.exit_code == 0, done.output
    assert (tmp_path / "to/w.bin").read_text() == "weights"
    assert (tmp_path / "to/deep/c.json").resolve() == (source / "deep/c.json").resolve()
    assert stage(source, "--to", tmp_path / "to", "--cache-dir", tmp_path / "cache").exit_code == 0


def test_a_file_of_the_user_is_not_replaced(source: Path, tmp_path: Path) -> None:
    mine = tmp_path / "to" / "w.bin"
    mine.parent.mkdir()
    mine.write_text("my own work")
    done = stage(source, "--to", mine.parent, "--cache-dir", tmp_path / "cache")
    assert done.exit_code == 1
    assert f"{mine}: another file has the name of the link" in done.output
    assert mine.read_text() == "my own work"


@pytest.mark.parametrize("inside", ["hub/models--a--b/snapshots/c", "objects", "partial"])
def test_links_do_not_lie_inside_the_cache(source: Path, tmp_path: Path, inside: str) -> None:
    done = stage(source, "--to", tmp_path / "cache" / inside, "--cache-dir", tmp_path / "cache")
    assert done.exit_code == 1
    assert "inside the cache" in done.output
    assert not (tmp_path / "cache" / inside).exists()


@pytest.mark.parametrize("option", ["--to", "--cache-dir", "--report"])
def test_an_option_without_its_value(source: Path, option: str) -> None:
    done = stage(source, option, "")
    assert done.exit_code == 2
    assert "may not be empty" in done.output


def test_a_report_without_a_folder_is_found_first(source: Path, tmp_path: Path) -> None:
    done = stage(source, "--report", tmp_path / "no/r.json", "--to", tmp_path / "to", "--cache-dir", tmp_path / "c")
    assert done.exit_code == 1
    assert f"{tmp_path / 'no'}: the folder for the report does not exist" in done.output
    assert not (tmp_path / "to").exists()


def test_an_empty_revision() -> None:
    with pytest.raises(weightferry.BadRequest, match="revision is empty"):
        weightferry.stage("org/name", revision="")


def test_a_folder_with_a_circle_and_a_dangling_link(source: Path) -> None:
    (source / "me").symlink_to(".")
    (source / "deep" / "up").symlink_to(source)
    (source / "latest").symlink_to("nowhere")
    found = FilesystemOrigin(Settings()).resolve(Source("file", str(source)), [""])
    assert [file.path for file in found.files] == ["deep/c.json", "latest", "w.bin"]
    assert weightferry.stage(source, ignore_patterns="latest") == source
    with pytest.raises(weightferry.SourceNotFound, match="latest: this file does not exist for this rank"):
        weightferry.stage(source)
