"""The ``saccade`` command: one small file per verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import sys
from typing import Any

import typer

from saccade.errors import UserError

Misuse: Any = typer.BadParameter.__bases__[0]  # the parser's class for all usage errors; its home moves
INTERRUPTED = 130

app = typer.Typer(
    help="Adaptive compute for Vision Transformers: measure which setting is worth it, and deploy it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a user's mistake is one line on standard error and exit code 2, never a traceback."""
    from saccade.cli import (  # noqa: F401  (each adds its verb)
        analyze,
        bench,
        calibrate,
        convert,
        demo,
        detect,
        eval,
        list,
        predict,
        segment,
        stem,
        train,
        tune,
        view,
        zeroshot,
    )

    given = sys.argv[1:] if arguments is None else arguments
    try:
        code = app(spread_values(given or ["--help"]), prog_name="saccade", standalone_mode=False)
    except UserError as error:
        print(f"saccade: {error}", file=sys.stderr)
        sys.exit(2)
    except Misuse as error:
        print(f"saccade: {error.format_message()} (see saccade --help)", file=sys.stderr)
        sys.exit(2)
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    if code == INTERRUPTED:
        print("saccade: interrupted; nothing was kept to take up", file=sys.stderr)
    sys.exit(code or 0)


def spread_values(arguments: list[str]) -> list[str]:
    """``--batch 1 8 32`` -> ``--batch 1 --batch 8 --batch 32``, which is all that the parser below understands."""
    spread: list[str] = []
    repeating = False
    for argument in arguments:
        if repeating and argument.isdigit() and spread[-1] != "--batch":
            spread.append("--batch")
        elif not argument.isdigit():
            repeating = argument == "--batch" or argument.startswith("--batch=")
        spread.append(argument)
    return spread
