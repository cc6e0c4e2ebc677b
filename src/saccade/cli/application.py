"""The command line itself, to which each file adds its verb."""

from __future__ import annotations

from typing import Any

import typer

Misuse: Any = typer.BadParameter.__bases__[0]  # the parser's class for all usage errors; its home moves


INTERRUPTED = 130


app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
