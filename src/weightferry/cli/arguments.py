"""Options and types of arguments that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click


class NonEmptyPath(click.Path):
    """A path that is not the empty text: ``--cache-dir "$UNSET"`` would mean the current folder."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        if value == "":
            self.fail("may not be empty", param, ctx)
        return super().convert(value, param, ctx)


path_type = NonEmptyPath(path_type=Path)

cache_dir_option = click.option("--cache-dir", metavar="D", type=path_type, help="Cache folder of this node.")
revision_option = click.option("--revision", metavar="R", help="Branch, tag or commit of a Hub repository.")
include_option = click.option(
    "--include", metavar="GLOB", multiple=True, help="Only files that match the pattern; repeatable."
)
exclude_option = click.option(
    "--exclude", metavar="GLOB", multiple=True, help="No files that match the pattern; repeatable."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
