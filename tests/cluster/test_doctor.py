"""``weightferry doctor``, and its older name slurm/qualify.py."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from weightferry.doctor.disk import filesystem_in
from weightferry.doctor.folders import group_by_visibility

REPOSITORY = Path(__file__).parents[2]
DOCTOR = (sys.executable, "-m", "weightferry", "doctor")
SCRIPT = (sys.executable, REPOSITORY / "slurm" / "qualify.py")


def doctor(folder, *arguments, command=DOCTOR, timeout=100):
    """Run the command as a user does; return the ended process and the JSON report."""
    to = folder / "qualify.json"
    done = subprocess.run(
        [*command, "--json", to, "--folder", folder / "jobs", "--size-mb", "32", *arguments],
        # A user has the package, not the checkout: neither `slurm` nor `tests` can be imported.
        env={**os.environ, "PYTHONPATH": os.fspath(REPOSITORY / "src")},
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    print(done.stdout, done.stderr)
    return done, json.loads(to.read_text()) if to.exists() else None


def folder_of(report, path):
    return next(folder for folder in report["folders"] if folder["folder"] == str(path))


def test_two_nodes_with_their_own_caches_and_a_shared_folder(outside):
    folder = outside.shared / "qualify"
    folder.mkdir()

    done, report = doctor(
        folder,
        *("--nodes", "2", "--slurm", "nodelist=node1,node2", "--cache-dir", "/local/new/cache"),
        *("--shared", folder, "--shared", "/local", "--collect-in", "/local"),
    )

    assert done.returncode == 0
    assert [(node["host"], node["interface"]) for node in report["nodes"]] == [("node1", "eth0"), ("node2", "eth0")]
    for node in report["nodes"]:
        cache = node["cache"]
        assert (cache["problem"], cache["filesystem"], cache["flock"], cache["fallocate"]) == (
            None,
            "tmpfs",
            "ok",
            "ok",
        )
        assert cache["write_mb_s"] > 0 < cache["read_mb_s"]
    shared = folder_of(report, folder)
    assert (shared["shared"], shared["groups"], shared["locks"]) == (True, [[0, 1]], "exclude")
    assert shared["visible_s"] < 1
    for own in ("/local/new/cache", "/local"):
        assert not folder_of(report, own)["shared"]
        assert folder_of(report, own)["groups"] == [[0], [1]]
        assert folder_of(report, own)["locks"] is None
    assert folder_of(report, "/local")["roles"] == ["shared", "collect_in"]
    assert [(peer["sender"], peer["receiver"]) for peer in report["peers"]] == [(1, 0), (0, 1)]
    assert all(10 < peer["mb_s"] < 260 for peer in report["peers"])  # the links are 250 MB/s
    stage = report["stage"]
    assert stage["nodes_sha256"] == [stage["sha256"]] * 2
    assert sum(stage["nodes_origin_bytes"]) >= 32_000_000
    assert report["verdict"]["fit"]
    assert report["verdict"]["cache_dir"] == "/local/new/cache"
    assert "/local is not shared between all nodes" in report["verdict"]["notes"]
    assert "verdict: fit" in done.stdout
    # Nothing is left: no job folder, no marker file, no cache folder that this run created.
    assert [path.name for path in folder.iterdir()] == ["qualify.json"]
    left = outside.srun("-N4", "sh", "-c", "ls -A /local").stdout
    assert "new" not in left
    assert ".weightferry-qualify" not in left


def test_a_cache_folder_that_cannot_be_written_is_named_with_its_node(outside):
    folder = outside.shared / "qualify-blocked"
    folder.mkdir()
    outside.run(["touch", "/local/blocked"], "node2")

    done, report = doctor(
        folder, "--nodes", "2", "--slurm", "nodelist=node1,node2", "--cache-dir", "/local/blocked/cache"
    )

    outside.run(["rm", "/local/blocked"], "node2")
    assert done.returncode == 1
    (wrong,) = report["verdict"]["wrong"]
    assert wrong.startswith("node2: the cache folder /local/blocked/cache: ENOTDIR")
    assert wrong in done.stdout
    assert "verdict: not fit" in done.stdout
    assert report["stage"] is None
    assert "blocked" not in outside.run(["ls", "/local"], "node1").stdout


def test_a_cache_on_the_shared_folder_is_staged_once(outside):
    folder = outside.shared / "qualify-shared"
    folder.mkdir()

    done, report = doctor(folder, "--nodes", "2", "--cache-dir", folder / "cache")

    assert done.returncode == 0
    assert folder_of(report, folder / "cache")["locks"] == "exclude"
    assert sorted(report["stage"]["nodes_origin_bytes"]) == [0, 32_000_000]
    assert report["stage"]["nodes_sha256"] == [report["stage"]["sha256"]] * 2
    assert [path.name for path in folder.iterdir()] == ["qualify.json"]


def test_the_reason_for_a_refused_job_is_printed(outside):
    done, report = doctor(outside.shared, "--nodes", "2", "--partition", "nowhere")

    assert done.returncode == 1
    assert "invalid partition" in done.stdout
    assert not report["verdict"]["fit"]


def test_one_node_on_this_machine_without_slurm(tmp_path):
    done, report = doctor(tmp_path, "--nodes", "1", "--cluster", "local", "--cache-dir", tmp_path / "cache")

    assert done.returncode == 0
    assert report["stage"]["nodes_sha256"] == [report["stage"]["sha256"]]
    assert report["stage"]["nodes_origin_bytes"] == [32_000_000]
    assert report["peers"] == []
    assert [path.name for path in tmp_path.iterdir()] == ["qualify.json"]


def test_an_origin_that_does_not_answer_is_a_problem(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTFERRY_RETRIES", "1")

    done, report = doctor(
        tmp_path,
        *("--nodes", "1", "--cluster", "local", "--cache-dir", tmp_path / "cache"),
        *("--origin", "http://user:secret@127.0.0.1:9/weights.bin"),
    )

    assert done.returncode == 1
    (wrong,) = report["verdict"]["wrong"]
    assert "cannot read the origin http://<hidden>@127.0.0.1:9/weights.bin: OriginUnreachable" in wrong
    assert "secret" not in done.stdout + done.stderr


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        (DOCTOR, ()),
        (DOCTOR, ("--nodes", "2", "--cluster", "local")),
        (DOCTOR, ("--nodes", "2", "--origin", "/a/path")),
        (SCRIPT, ("--nodes", "2", "--cluster", "local")),
    ],
)
def test_wrong_arguments_are_refused_before_the_job_is_submitted(tmp_path, command, arguments):
    done, _ = doctor(tmp_path, *arguments, command=command)

    assert done.returncode == 2
    assert list(tmp_path.iterdir()) == []


MOUNTS = r"""
22 1 0:20 / / rw,relatime - overlay overlay rw
23 22 8:1 / /scratch rw shared:1 - ext4 /dev/sda1 rw
24 22 8:1 / /scratch rw shared:1 master:2 - lustre mds:/fs rw
25 22 8:2 / /with\040space rw - xfs /dev/sdb1 rw
"""


@pytest.mark.parametrize(
    ("folder", "kind"),
    [("/", "overlay"), ("/scratch/me", "lustre"), ("/scratchy", "overlay"), ("/with space/a", "xfs")],
)
def test_the_innermost_and_last_mount_decides_the_file_system(folder, kind):
    assert filesystem_in(MOUNTS.strip(), Path(folder)) == kind


def test_ranks_that_see_each_others_files_are_a_group():
    assert group_by_visibility({0: [0, 1], 1: [0, 1], 2: [2], 3: []}) == [[0, 1], [2]]
    # Rank 0 sees the file of rank 1, rank 1 does not see the file of rank 0: the folder is not shared.
    assert group_by_visibility({0: [0, 1], 1: [1]}) == [[0], [1]]
