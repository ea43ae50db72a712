"""What can be checked of code that needs a cluster: syntax, and whether the names and options in it exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import subprocess
from dataclasses import fields
from importlib.util import find_spec
from typing import Any

import click

from tests.docs.blocks import ROOT
from weightferry.cli import main
from weightferry.settings import PREFIX, Settings

_TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
_VARIABLES = {PREFIX + spec.name.upper() for spec in fields(Settings)}
_EXTRAS = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE))


def check_shell(text: str) -> None:
    """Check a script, or the commands of a console block.

    Raises
    ------
    AssertionError
        Bash does not accept it, or it uses an option, target, extra, variable or file that does not exist.
    """
    parsed = subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True, check=False)
    assert parsed.returncode == 0, parsed.stderr
    unknown = set(re.findall(rf"\b{PREFIX}[A-Z_]+", text)) - _VARIABLES - {"WEIGHTFERRY_TEST_TRIALS"}
    assert not unknown, f"no such setting: {unknown}"
    for path in re.findall(r"\bslurm/[\w./-]+", text):
        assert (ROOT / path).exists(), f"no such file: {path}"
    for line in re.sub(r"\\\n", " ", text).splitlines():
        if not line.lstrip().startswith("#"):
            _check_words(shlex.split(line, comments=True))


def _check_words(words: list[str]) -> None:
    for at, word in enumerate(words):
        after = words[at + 1 :]
        if word == "weightferry" and (at == 0 or words[at - 1] not in ("install", "-c")):
            check_options(after)
        elif word == "make":
            for target in (one for one in after if re.fullmatch("[a-z-]+", one)):
                assert target in _TARGETS, f"no target {target!r} in the Makefile"
        elif word == "-m" and after and after[0].startswith(("weightferry", "slurm")):
            assert find_spec(after[0]), f"no module {after[0]}"
        elif extra := re.search(r"weightferry\[([\w,]+)\]", word):
            assert set(extra[1].split(",")) <= _EXTRAS, f"no such extra: {word}"


def check_options(words: list[str]) -> None:
    """Parse the arguments of ``weightferry`` as the command line does, without running anything."""
    command: click.Command = main
    context = click.Context(main, info_name="weightferry")
    while True:
        # A comment in the shell, a pipe or a redirection ends the arguments.
        words = words[: next((n for n, word in enumerate(words) if word in ("|", ">", "2>", "&&", ";", "||")), None)]
        command.make_parser(context).parse_args(list(words))
        if not isinstance(command, click.Group):
            return
        name = next(word for word in words if not word.startswith("-"))
        assert name in command.commands, f"no command {name!r} in {context.command_path}"
        words = words[words.index(name) + 1 :]
        command = command.commands[name]
        context = click.Context(command, parent=context, info_name=name)


def check_python(text: str) -> None:
    """Compile, and look up every name of the package and every keyword that its functions are called with."""
    tree = ast.parse(text)
    names: dict[str, Any] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "weightferry":
                    importlib.import_module(alias.name)
                    names["weightferry"] = importlib.import_module("weightferry")
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "weightferry":
            for alias in node.names:
                names[alias.asname or alias.name] = _member(importlib.import_module(node.module or ""), alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and (function := _resolve(node.func, names)) is not None:
            taken = inspect.signature(function).parameters
            loose = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in taken.values())
            for keyword in node.keywords:
                assert loose or keyword.arg is None or keyword.arg in taken, f"{function} takes no {keyword.arg}"


def _member(module: Any, name: str) -> Any:
    if hasattr(module, name):
        return getattr(module, name)
    return importlib.import_module(f"{module.__name__}.{name}")


def _resolve(node: ast.expr, names: dict[str, Any]) -> Any:
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and (owner := _resolve(node.value, names)) is not None:
        assert hasattr(owner, node.attr), f"{owner} has no {node.attr}"
        return getattr(owner, node.attr)
    return None
