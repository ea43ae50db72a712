"""The generated pages have every setting, command, option and launcher; the Python page has every public name."""

from __future__ import annotations

import re
from dataclasses import fields

import click

import weightferry
from docs.hooks import pages
from tests.docs.blocks import ROOT
from weightferry.cli import main
from weightferry.cluster.launchers import LAUNCHERS
from weightferry.launch import __all__ as launch_names


def test_every_setting_is_described() -> None:
    page = pages.settings_page()
    for spec in fields(weightferry.Settings):
        assert f"`WEIGHTFERRY_{spec.name.upper()}`" in page
        text = page.partition(f"\n## {spec.name}\n")[2].lstrip()
        # Settings that share a description have their headings above one another.
        assert re.match(r"(## \w+\n+)*[A-Z]", text), f"no description of {spec.name}"


def test_every_command_and_option_is_described() -> None:
    page = pages.commands_page()
    commands = list(pages.walk("weightferry", main))
    assert len(commands) > 10
    for path, command in commands:
        section = re.split(r"^## ", page.partition(f"\n## {path}\n")[2], flags=re.MULTILINE)[0]
        assert (command.help or "").split("\n")[0].split("`")[0] in section.replace("\\", ""), path
        for option in (one for one in command.params if isinstance(one, click.Option)):
            assert option.opts[-1] in section, f"{path} {option.opts}"


def test_every_launcher_is_in_the_table() -> None:
    table = pages.launchers_table()
    for launcher in LAUNCHERS:
        assert f"`{launcher.rank}` | `{launcher.world_size}`" in table


def test_every_public_name_is_on_the_page() -> None:
    page = (ROOT / "docs/reference/api.md").read_text()
    named = set(re.findall(r"^::: weightferry\.(?:launch\.submit\.)?(\w+)$", page, re.MULTILINE))
    errors = {name for name in weightferry.__all__ if getattr(weightferry, name).__class__ is type}
    errors = {name for name in errors if getattr(weightferry, name).__module__ == "weightferry.errors"}
    missing = {*weightferry.__all__, *launch_names} - named - errors - {"__version__"}
    assert not missing, f"not on the page: {sorted(missing)}"
    assert "errors" in named
