"""The ``saccade`` command: one small file per verb. Nothing heavy is imported before a verb runs."""

from __future__ import annotations

import io
import os
import sys
from contextlib import suppress
from typing import Annotated

import typer

from saccade.cli.application import INTERRUPTED, Misuse, app
from saccade.errors import UserError


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        from saccade import __version__

        def of(package: str) -> str:
            try:
                return version(package)
            except PackageNotFoundError:
                return "not installed"

        print(f"saccade {__version__}, torch {of('torch')}, timm {of('timm')}")
        raise typer.Exit


@app.callback()
def common(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True)
    ] = False,
    plugin: Annotated[
        str | None,
        typer.Option(
            metavar="FILE", help="A Python file with your own methods (docs/add-a-method.md); also after the verb."
        ),
    ] = None,
) -> None:
    """Adaptive compute for Vision Transformers: measure which setting is worth it, and deploy it.

    Example: saccade tune vit_tiny_patch16_224 photos/ --pretrained --target 1.5x
    """


def main(arguments: list[str] | None = None) -> None:
    """Run the command; a user's mistake is one line on standard error and exit code 2, never a traceback."""
    from saccade.cli import (  # noqa: F401  (each adds its verb)
        analyze,
        autotune,
        bench,
        calibrate,
        convert,
        demo,
        detect,
        doctor,
        eval,
        export,
        list,
        predict,
        segment,
        stem,
        train,
        tune,
        view,
        zeroshot,
    )

    given, plugins = without_plugins(sys.argv[1:] if arguments is None else arguments)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal without these characters gets others, no traceback
            stream.reconfigure(errors="replace")
    try:
        if plugins:
            from saccade.core.plugins import load_plugin

            for file in plugins:
                load_plugin(file)
        code = app(spread_values(given or ["--help"]), prog_name="saccade", standalone_mode=False)
        sys.stdout.flush()  # what cannot be written is said here
    except UserError as error:
        print(f"saccade: {error}", file=sys.stderr)
        sys.exit(2)
    except Misuse as error:
        verb = "saccade" if error.ctx is None else error.ctx.command_path
        print(f"saccade: {error.format_message()} (see {verb} --help)", file=sys.stderr)
        sys.exit(2)
    except BrokenPipeError:  # who read has read enough, as in `saccade list | head`
        _give_up_output()
        sys.exit(1)  # as the parser has it, which meets most of these itself
    except (KeyboardInterrupt, typer.Abort):
        code = INTERRUPTED
    except Exception as error:  # a full disk, a name that is too long: no mistake of the program
        from saccade.storage.files import shortened, system_reason

        if (reason := system_reason(error)) is None:
            raise
        place = getattr(error, "filename", None)
        print(f"saccade: {f'{shortened(place)}: ' if place else ''}{reason}", file=sys.stderr)
        _give_up_output()
        sys.exit(2)
    if code == INTERRUPTED:
        print("saccade: interrupted; nothing was kept to take up", file=sys.stderr)
    sys.exit(code or 0)


def _give_up_output() -> None:
    """Write what is still to be written, or, where that is what failed, drop it, so that the end says nothing more."""
    try:
        sys.stdout.flush()
    except OSError:
        with suppress(OSError, ValueError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def without_plugins(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The arguments but for ``--plugin FILE``, wherever it stands, and the files."""
    rest, files = [], []
    given = iter(arguments)
    for argument in given:
        name, _, value = argument.partition("=")
        if name == "--plugin":
            files.append(value or next(given, ""))
        else:
            rest.append(argument)
    return rest, files


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
