"""What the groups of commands share."""

from __future__ import annotations

import os
import sys
from typing import Any

import click

PIPE_CLOSED = 141  # what a shell reports for a writer whose reader has gone


class Commands(click.Group):
    """A group whose output may be cut off, as by `| head`, without a traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command and push its output out while a broken pipe can still be caught."""
        try:
            result = super().invoke(ctx)
            sys.stdout.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            ctx.exit(PIPE_CLOSED)
        return result


def print_json(value: Any) -> None:
    """Print a value for scripts."""
    import json

    click.echo(json.dumps(value, indent=2, ensure_ascii=False))


json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON for scripts.")
