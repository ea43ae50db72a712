"""The origin of the cluster tests: one repository, served inside the testbed."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slurm.testbed import Testbed

REPO = "org/model"
SIZES = {"model.safetensors": 6_000_000, "shards/part.bin": 2_000_000, "config.json": 40}
# Different from the ports in the testbed's own tests.
PORT, CDN_PORT = 8100, 8101


@dataclass(frozen=True)
class Served:
    """A Hub in the testbed.

    Attributes
    ----------
    testbed
        The testbed that it runs in.
    url
        The value of ``HF_ENDPOINT``.
    sha256
        The SHA-256 of each file, by path.
    """

    testbed: Testbed
    url: str
    sha256: dict[str, str]

    @property
    def environ(self) -> dict[str, str]:
        """Environment variables for commands in the testbed."""
        return {"HF_ENDPOINT": self.url, "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1", "OMP_NUM_THREADS": "1"}

    def content_bytes(self) -> int:
        """Return the bytes of files that the Hub has served so far."""
        answer = self.testbed.run(["curl", "-s", f"{self.url}/-/stats"], "origin").stdout
        count: int = json.loads(answer)["content_bytes"]
        return count

    def stage(self, *arguments: str | Path, tasks_per_node: int = 1) -> dict[str, Any]:
        """Run `weightferry stage` under srun on all nodes; return its report."""
        report = self.testbed.shared / "report.json"
        nodes = f"-N{len(self.testbed.nodes)}"
        command = ["srun", "--kill-on-bad-exit=1", nodes, f"--ntasks-per-node={tasks_per_node}"]
        command += [sys.executable, "-m", "weightferry.cli", "stage", REPO, "--report", str(report)]
        self.testbed.run([*command, *map(str, arguments)], env=self.environ, timeout=120)
        found: dict[str, Any] = json.loads(report.read_text())
        return found
