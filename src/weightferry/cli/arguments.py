"""A path on the command line that has a name: ``--cache-dir "$UNSET"`` would mean the current folder."""

from __future__ import annotations

from typing import Any

import click


class NamedPath(click.Path):
    """A path that is not the empty text."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See `click.ParamType`."""
        if value == "":
            self.fail("may not be empty", param, ctx)
        return super().convert(value, param, ctx)
