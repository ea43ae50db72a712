"""Every example runs as its table says, with real ranks and the real package; all ranks hold the right weights."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.examples import models
from tests.examples.processes import run_to_end
from weightferry.testing.hub import HubServer

EXAMPLES = Path(__file__).parents[2] / "examples"
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
ALONE = (sys.executable,)
LIMIT = 600.0  # seconds; several processes import large packages, perhaps on a busy machine

# SpeechBrain imports torchaudio, which cannot be imported beside every torch.
TORCHAUDIO = Path(__file__).parents[1] / "speechbrain/stubs"

MODELS: dict[str, Callable[[Path], str]] = {
    "org/bert": models.bert,
    "org/masked": models.masked_bert,
    "org/adapter": models.adapter,
    "org/sharded": models.sharded,
    "org/checkpoint": models.distributed_checkpoint,
    "org/sentences": models.sentence_encoder,
    "org/linear": models.linear,
}

Run = Callable[..., None]

# Warnings that other packages give while a model is made: peft asks transformers for a name that transformers has
# renamed, and torch says that it saves a checkpoint in a single process, as it is told to.
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled, unavailable or uninitialized:UserWarning"),
]


class Repositories:
    """A Hub that gets a model when an example asks for it, and what ranks print that hold it."""

    def __init__(self, hub: HubServer, folder: Path) -> None:
        self.hub, self._folder = hub, folder
        self._printed: dict[str, str] = {}

    def printed(self, source: str) -> str:
        """What a rank prints that holds the model; the model is made if it is not there yet."""
        if source not in self._printed:
            self._printed[source] = MODELS[source](self._folder / source)
            self.hub.add_repo(source, self._folder / source)
        return self._printed[source]


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repositories]:
    with HubServer() as hub:
        yield Repositories(hub, tmp_path_factory.mktemp("models"))


@pytest.fixture
def run(repositories: Repositories, tmp_path: Path) -> Run:
    """Run an example to its end; each of its two ranks must print what a rank prints that holds the last source."""

    def run(command: tuple[str, ...], example: str, *sources: str, options: tuple[str, ...] = ()) -> None:
        right = [repositories.printed(source) for source in sources][-1]
        variables = {"RAY_USAGE_STATS_ENABLED": "0"}
        if "speechbrain" in example:
            variables["PYTHONPATH"] = os.pathsep.join(filter(None, [str(TORCHAUDIO), os.environ.get("PYTHONPATH")]))
        full_command = [*command, str(EXAMPLES / example), *sources, *options]
        done = run_to_end(full_command, repositories.hub, tmp_path, LIMIT, variables)
        # Two ranks write to one stream, so the end of a line may come after the next line.
        lines = re.findall(r"rank \d+: fingerprint (?:(?!rank \d).)*", done.stdout)
        wrong = [line for line in lines if not re.fullmatch(rf"rank [01]: {re.escape(right)}(?!\d).*", line)]
        assert not wrong, f"{right} is right, printed was {wrong}"
        assert sorted(line[:6] for line in lines) == ["rank 0", "rank 1"], done.stdout + done.stderr

    return run


@pytest.mark.timeout(LIMIT + 60)
@pytest.mark.parametrize(
    ("example", "sources"),
    [
        ("transformers_from_pretrained.py", ["org/bert"]),
        ("transformers_trainer.py", ["org/masked"]),
        ("accelerate_script.py", ["org/bert"]),
        ("lightning_ddp.py", ["org/bert"]),
        ("fsdp2_meta.py", ["org/sharded"]),
        ("dcp_resume.py", ["org/checkpoint"]),
        ("speechbrain_recipe.py", ["org/linear"]),
        ("peft_lora.py", ["org/bert", "org/adapter"]),
        ("sentence_transformers_encode.py", ["org/sentences"]),
    ],
)
def test_under_torchrun(run: Run, example: str, sources: list[str]) -> None:
    run(TORCHRUN, example, *sources)


@pytest.mark.timeout(LIMIT + 60)
def test_ray_train(run: Run) -> None:
    run(ALONE, "ray_train.py", "org/bert", options=("--workers", "2"))


@pytest.mark.timeout(LIMIT + 60)
def test_submitit(run: Run) -> None:
    run(ALONE, "submitit_requeue.py", "org/bert", options=("--cluster", "local"))


def test_the_manifest_for_kubernetes() -> None:
    import kubernetes_validate
    import yaml

    documents = list(yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text()))
    assert [document["kind"] for document in documents] == ["Service", "Job"]
    for document in documents:
        kubernetes_validate.validate(document, kubernetes_validate.latest_version(), strict=True)


def test_the_manifest_starts_torchrun_on_each_pod() -> None:
    import yaml
    from torch.distributed.run import parse_args

    service, job = yaml.safe_load_all((EXAMPLES / "kubernetes.yaml").read_text())
    assert (job["spec"]["completionMode"], job["spec"]["completions"]) == ("Indexed", job["spec"]["parallelism"])
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert container["command"] == ["torchrun"]
    given = parse_args([arg.replace("$(JOB_COMPLETION_INDEX)", "0") for arg in container["args"]])
    assert (given.nnodes, given.node_rank) == (str(job["spec"]["completions"]), 0)
    assert given.master_addr == f"{job['metadata']['name']}-0.{pod['subdomain']}"
    assert service["metadata"]["name"] == pod["subdomain"]
    assert service["spec"]["selector"] == {"job-name": job["metadata"]["name"]}


def test_the_table_lists_every_example() -> None:
    table = (EXAMPLES / "README.md").read_text()
    rows = re.findall(r"^\| \[(\S+)\]\((\S+)\) \| [^|]+ \| `([^`|]+)` \|$", table, re.MULTILINE)
    assert sorted(file for file, _, _ in rows) == sorted(
        path.name for path in EXAMPLES.iterdir() if path.suffix in (".py", ".yaml")
    )
    for file, link, command in rows:
        assert (link, f"examples/{file}" in command) == (file, True)


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_an_example_fits_on_a_page(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 60
    assert f"examples/{path.name}" in path.read_text(), "the docstring shows the command"
