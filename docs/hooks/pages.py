"""Pages and tables of the reference that are made from the code: settings, commands, launchers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import click


def settings_page() -> str:
    """Return the page with every field of `weightferry.Settings`, its variable, type, default and meaning."""
    from weightferry.settings import PREFIX, Settings

    types = {spec.name: str(spec.type) for spec in fields(Settings)}
    # The default of a folder depends on the machine: its text is in the docstring.
    defaults = {spec.name: repr(spec.default) for spec in fields(Settings) if not callable(spec.default_factory)}
    first = (
        "Each setting is a field of `weightferry.Settings` and an environment variable: `WEIGHTFERRY_` and the name in "
        "capitals. A value that the caller passes wins over the variable, and the variable wins over the default. "
        "[Settings in Python](api.md#weightferry.Settings) shows the class."
    )
    lines = [
        "# Settings",
        "",
        first,
        "",
        "| setting | variable | type | default |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| [`{name}`](#{name}) | `{PREFIX}{name.upper()}` | `{kind}` | {_code(defaults.get(name, '')) or 'below'} |"
        for name, kind in types.items()
    ]
    described = set[str]()
    for names, text in _attributes(Settings.__doc__ or ""):
        described |= {*names}
        # One heading for each name, so that each has an anchor of its own.
        lines += ["", *(f"## {name}" for name in names), "", _markdown(text)]
    if missing := types.keys() - described:
        raise ValueError(f"the docstring of Settings does not describe: {', '.join(sorted(missing))}")
    return "\n".join(lines) + "\n"


def _attributes(docstring: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """Yield names and description of each entry in the section Attributes of a NumPy docstring."""
    section = docstring.partition("Attributes\n    ----------\n")[2]
    for entry in re.split(r"\n(?=    \w)", section.rstrip()):
        head, _, body = entry.partition("\n")
        names = tuple(name.strip() for name in head.partition(" : ")[0].split(","))
        yield names, re.sub(r"\s+", " ", body).strip()


def commands_page() -> str:
    """Return the page with every command of `weightferry`, its arguments and its options."""
    from weightferry.cli import main

    lines = ["# Commands", "", "`weightferry COMMAND --help` prints the same text.", ""]
    for path, command in walk("weightferry", main):
        # The root itself is shown too: it has options of its own.
        lines += [f"## {path}", "", *_command(path, command), ""]
    return "\n".join(lines)


def walk(path: str, command: click.Command) -> Iterator[tuple[str, click.Command]]:
    """Yield a command and all commands below it, each with the words that name it."""
    yield path, command
    for name, child in sorted(getattr(command, "commands", {}).items()):
        yield from walk(f"{path} {name}", child)


def _command(path: str, command: click.Command) -> Iterator[str]:
    import click

    context = click.Context(command, info_name=path)
    # Not in a fence: every fenced block of the documentation is executed by a test.
    yield f"`{path} {' '.join(command.collect_usage_pieces(context))}`"
    yield ""
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        yield _markdown(paragraph.replace("\n", " "))
        yield ""
    options = [one for one in command.params if isinstance(one, click.Option)]
    records = [record for option in options if (record := option.get_help_record(context))]
    if records:
        yield "| option | meaning |"
        yield "|---|---|"
        for record in records:
            yield f"| {_code(record[0])} | {_markdown(re.sub('  +', ' ', record[1]))} |"


def launchers_table() -> str:
    """Return a table of the launchers that are known, in the order in which they win, and their variables."""
    from weightferry.cluster.launchers import LAUNCHERS

    lines = ["| launcher | rank | size | local rank | ranks of the node |", "|---|---|---|---|---|"]
    for one in LAUNCHERS:
        names = (one.rank, one.world_size, one.local_rank, one.local_world_size)
        lines.append(f"| {one.name} | {' | '.join(_code(name) for name in names)} |")
    return "\n".join(lines)


def _markdown(text: Any) -> str:
    """Make Markdown of a text with the marks of reStructuredText; what a table or HTML would swallow is escaped."""
    text = str(text).strip().replace("``", "`")
    parts = re.split(r"(`[^`]*`)", text)
    # Outside of code only: a glob or a name with underscores is no emphasis.
    parts[::2] = [re.sub(r"([*_<>|\[\]])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


TABLES = {"launchers": launchers_table}
"""By name, what ``<!-- table: NAME -->`` on a page is replaced with."""
