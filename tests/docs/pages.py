"""Runs the blocks of one page: Python on two real ranks, commands each in a process of its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shlex
import socket
from pathlib import Path
from typing import Any

import torch
from click.testing import CliRunner
from torch import distributed as dist

from tests.multiprocess.nodes import PRELOAD
from weightferry.testing.hub import HubServer
from weightferry.testing.ranks import run_ranks

TOKEN = "hf_" + "a" * 30
_PLACES = ("/local/", "/shared/", "/opt/weights")
_CLEARED = dict.fromkeys(("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE"), "")


def encoder() -> torch.nn.Module:
    """The module that pages call ``encoder``."""
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(256, 64), torch.nn.ReLU())


def fill(hub: HubServer) -> None:
    """Serve the repositories that pages name."""
    from safetensors.torch import save

    weights = {name: tensor + 1 for name, tensor in encoder().state_dict().items()}
    ckpt = io.BytesIO()
    torch.save(weights, ckpt)
    shards = {f"model-0000{number}-of-00002.safetensors": {key: weights[key]} for number, key in enumerate(weights, 1)}
    index = {"weight_map": {key: name for name, shard in shards.items() for key in shard}}
    files = {
        "config.json": b"{}",
        "encoder.safetensors": save(weights),
        "encoder.ckpt": ckpt.getvalue(),
        "prefixed.safetensors": save({f"model.encoder.{key}": value for key, value in weights.items()}),
        "model.safetensors": save(weights, metadata={"format": "pt"}),
        "model.safetensors.index.json": json.dumps(index).encode(),
        **{name: save(shard) for name, shard in shards.items()},
    }
    hub.add_repo("org/name", files)
    hub.add_repo("org/gated", files, gated=True, allowed_tokens=[TOKEN])


class PageFolder:
    """A folder in which a page runs; absolute folders that pages name lie in it."""

    def __init__(self, root: Path, hub: HubServer) -> None:
        self.root, self.hub = root, hub
        self.exported: dict[str, str] = {}
        (root / "here").mkdir()
        for place in _PLACES:
            (root / place.strip("/")).mkdir(parents=True)

    def environ(self, _: int = 0) -> dict[str, str]:
        """The variables of every process of the page."""
        return {
            **_CLEARED,
            "NO_PROXY": "*",
            "no_proxy": "*",
            "USER": "me",
            "HF_ENDPOINT": self.hub.url,
            "HF_HOME": str(self.root / "huggingface"),
            "WEIGHTFERRY_CACHE_DIR": str(self.root / "cache"),
            "WEIGHTFERRY_RETRY_WAIT": "0.05",
            **self.exported,
        }

    def mapped(self, text: str) -> str:
        """Return `text` with the folders of this place for those that a page names."""
        for place in _PLACES:
            text = text.replace(place, f"{self.root}{place}")
        return text

    def shown(self, text: str) -> str:
        """Return an output as a page would show it."""
        text = text.replace(str(self.root / "here") + "/", "./").replace(str(self.root), "")
        return text.replace(self.hub.url, "https://huggingface.co").replace(socket.gethostname(), "w1")

    def python(self, sources: list[tuple[str, str]]) -> list[str]:
        """Run blocks, each with its name, in one namespace on two ranks; what each prints on rank 0."""
        mapped = [(name, self.mapped(source)) for name, source in sources]
        outcomes = run_ranks(_python, 2, self.root, mapped, environ=self.environ, preload=PRELOAD)
        (first, *_) = [outcome.get() for outcome in outcomes]
        return [self.shown(text) for text in first]

    def console(self, command: str) -> tuple[str, str]:
        """Run one command line; exit code as text, and output."""
        words = shlex.split(os.path.expandvars(self.mapped(command.replace("$USER", "me"))))
        variables: dict[str, str] = {}
        while words and "=" in words[0] and words[0].partition("=")[0].isupper():
            name, _, value = words.pop(0).partition("=")
            variables[name] = value
        if words[0] == "export":
            self.exported |= dict(word.split("=", 1) for word in words[1:])
            return "0", ""
        assert words[0] == "weightferry", f"only weightferry is run by this test, mark the block `check`: {command}"
        environ = self.environ() | variables
        (outcome,) = run_ranks(_console, 1, self.root, words[1:], environ=lambda _: environ, preload=PRELOAD)
        code, output = outcome.get()
        return str(code), self.shown(output)


def _python(root: Path, sources: list[tuple[str, str]]) -> list[str]:
    os.chdir(root / "here")
    # Pages make the process group themselves, as users do; here the ranks have one already.
    dist.init_process_group = lambda *_, **__: None
    names: dict[str, Any] = {"__name__": "__main__"}
    printed = []
    for name, source in sources:
        with contextlib.redirect_stdout(io.StringIO()) as said:
            exec(compile(source, name, "exec"), names)
        printed.append(said.getvalue())
    return printed


def _console(root: Path, words: list[str]) -> tuple[int, str]:
    os.chdir(root / "here")
    from weightferry.cli import main

    done = CliRunner().invoke(main, words)
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    return done.exit_code, done.output
