"""What mkdocs calls while it builds the site: generated pages, the diagrams' script, and the check for docstrings."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import TYPE_CHECKING

import griffe
import pages
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

# With --strict, mkdocs counts what is logged below this name, and fails.
logger = logging.getLogger("mkdocs.hooks.weightferry")

ROOT = Path(__file__).parents[2]
MERMAID = ROOT / ".venv/mermaid/dist/mermaid.min.js"


def on_pre_build(config: MkDocsConfig) -> None:
    """Warn of every public module, class and function of the package without a docstring."""
    package = griffe.load("weightferry", search_paths=[str(ROOT / "src")])
    for path in _undocumented(package):
        logger.warning("%s has no docstring", path)


def _undocumented(item: griffe.Object) -> Iterator[str]:
    if not item.has_docstring and not item.is_attribute:
        yield item.path
    for member in item.members.values():
        # An imported name is documented where it is defined, and a nested function is no part of an interface.
        if member.is_alias or member.name.startswith("_") or item.is_function:
            continue
        yield from _undocumented(member)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are made from the code, and mermaid, which the theme would load from a CDN."""
    files.append(File.generated(config, "reference/settings.md", content=pages.settings_page()))
    files.append(File.generated(config, "reference/commands.md", content=pages.commands_page()))
    if not MERMAID.exists():
        raise PluginError(f"{MERMAID} is not there: `make docs` installs it")
    files.append(File.generated(config, "assets/mermaid.min.js", abs_src_path=str(MERMAID)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Put generated tables in their places, and take out the marks that tell tests how to run a block."""
    markdown = re.sub(r"<!-- table: (\w+) -->", lambda match: pages.TABLES[match[1]](), markdown)
    return re.sub(r"^ *<!-- test: .*? -->\n", "", markdown, flags=re.MULTILINE)
