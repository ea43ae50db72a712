"""Every example runs as its table says, with real ranks and the real package; all ranks hold the right weights."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.examples import models
from weightferry.testing.hub import HubServer

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
LIMIT = 300.0  # seconds; two processes import large packages on a busy machine

Run = Callable[..., str]


class Repositories:
    """A Hub with one repository for each model, and what ranks print that hold it."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self._folder = hub, folder
        self.printed: dict[str, str] = {}

    def add(self, name: str, make: Callable[..., str], *arguments: Path) -> Path:
        folder = self._folder / name
        self.printed[f"org/{name}"] = make(folder, *arguments)
        self.hub.add_repo(f"org/{name}", folder)
        return folder


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repositories]:
    with HubServer() as hub:
        made = Repositories(hub, tmp_path_factory.mktemp("models"))
        base = made.add("bert", models.bert)
        made.add("masked", models.masked_bert)
        made.add("adapter", models.adapter, base)
        made.add("sharded", models.sharded)
        made.add("checkpoint", models.distributed_checkpoint)
        made.add("sentences", models.sentence_encoder)
        yield made


@pytest.fixture
def run(repositories: Repositories, tmp_path: Path) -> Run:
    """Run an example to its end, and return what it printed."""

    def run(example: str, *arguments: str, command: tuple[str, ...] = TORCHRUN) -> str:
        environ = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "WEIGHTFERRY_"))}
        environ |= {"HF_ENDPOINT": repositories.hub.url, "HF_HOME": str(tmp_path / "huggingface")}
        environ |= {"WEIGHTFERRY_CACHE_DIR": str(tmp_path / "cache"), "HF_HUB_DISABLE_TELEMETRY": "1"}
        environ |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "NO_PROXY": "*"}
        done = subprocess.run(
            [*command, str(EXAMPLES / example), *arguments],
            env=environ,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            timeout=LIMIT,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run


def check(repositories: Repositories, source: str, printed: str) -> None:
    for rank in range(2):
        assert f"rank {rank}: {repositories.printed[source]}" in printed


@pytest.mark.timeout(LIMIT)
@pytest.mark.parametrize(
    ("example", "sources"),
    [
        ("transformers_from_pretrained.py", ["org/bert"]),
        ("transformers_trainer.py", ["org/masked"]),
        ("accelerate_script.py", ["org/bert"]),
        ("lightning_ddp.py", ["org/bert"]),
        ("fsdp2_meta.py", ["org/sharded"]),
        ("dcp_resume.py", ["org/checkpoint"]),
        ("peft_lora.py", ["org/bert", "org/adapter"]),
        ("sentence_transformers_encode.py", ["org/sentences"]),
    ],
)
def test_under_torchrun(run: Run, repositories: Repositories, example: str, sources: list[str]) -> None:
    check(repositories, sources[-1], run(example, *sources))


@pytest.mark.timeout(LIMIT)
def test_ray_train(run: Run, repositories: Repositories) -> None:
    check(repositories, "org/bert", run("ray_train.py", "org/bert", "--workers", "2", command=(sys.executable,)))


@pytest.mark.timeout(LIMIT)
def test_submitit(run: Run, repositories: Repositories) -> None:
    printed = run("submitit_requeue.py", "org/bert", "--cluster", "local", command=(sys.executable,))
    check(repositories, "org/bert", printed)


def test_the_manifest_for_kubernetes() -> None:
    import kubernetes_validate
    import yaml

    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_table_lists_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text()
    files = sorted(path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml"))
    assert sorted(set(re.findall(r"^\| \[(\S+)\]\(\1\)", table, re.MULTILINE))) == files


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_page(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
