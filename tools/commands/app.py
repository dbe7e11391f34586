"""Assemble the ``ditfastattn`` command from its subcommands, one file each, and run it."""

from __future__ import annotations

import logging
import sys
import traceback
from typing import Annotated

import typer
from rich.logging import RichHandler

from ditfastattn.core.errors import ConfigError, EngineError, TargetMissedError
from ditfastattn.tools.commands.bench import bench
from ditfastattn.tools.commands.bisect import bisect
from ditfastattn.tools.commands.book import book
from ditfastattn.tools.commands.build import build
from ditfastattn.tools.commands.calibrate import calibrate
from ditfastattn.tools.commands.demo import demo
from ditfastattn.tools.commands.diff import diff
from ditfastattn.tools.commands.doctor import doctor
from ditfastattn.tools.commands.export import export
from ditfastattn.tools.commands.generate import generate
from ditfastattn.tools.commands.inspect import inspect
from ditfastattn.tools.commands.serve import serve
from ditfastattn.tools.commands.surroundings import keep_compiled, silence_libraries
from ditfastattn.tools.commands.update_weights import update_weights
from ditfastattn.tools.commands.validate import validate
from ditfastattn.tools.commands.verify import verify
from ditfastattn.tools.terminal import open_console

COMMANDS = (
    demo,
    calibrate,
    inspect,
    diff,
    validate,
    bisect,
    export,
    build,
    verify,
    update_weights,
    doctor,
    bench,
    serve,
    generate,
)

EXIT_CODES = """\b
Exit codes:
  0    done
  1    measured, and missed: the target, the bundle's match, or an engine failed
  2    not possible as asked for: options, files, models; the message says the remedy
  70   a bug of ditfastattn
  130  interrupted (Ctrl-C); the message says how to resume
"""
_LONGEST = 400  # characters of a line of an error: five lines of a terminal
_LEVELS = (logging.WARNING, logging.INFO, logging.DEBUG)


def set_up_logging(
    verbose: Annotated[
        int,
        typer.Option("--verbose", "-v", count=True, help="Log each pass; twice: also each reason."),
    ] = 0,
) -> None:
    """Log to the terminal, on standard error."""
    logger = logging.getLogger("ditfastattn")
    logger.setLevel(_LEVELS[min(verbose, 2)])
    if not any(isinstance(handler, RichHandler) for handler in logger.handlers):
        logger.addHandler(RichHandler(console=open_console(stderr=True), show_path=False))


def assembled() -> typer.Typer:
    """Return the command with all subcommands."""
    app = typer.Typer(
        help="Make trained diffusion transformers faster with calibrated shortcuts.",
        epilog=EXIT_CODES,
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(set_up_logging)
    for command in COMMANDS:
        app.command()(command)
    app.add_typer(book, name="book")
    return app


app = assembled()


def run() -> None:
    """Run the command; its exit codes are in ``EXIT_CODES``."""
    keep_compiled()
    if "-vv" not in sys.argv:
        silence_libraries()
    try:
        app()
    except (ConfigError, EngineError) as error:
        typer.secho(f"error: {one_screen(str(error))}", err=True, fg="red")
        raise SystemExit(1 if isinstance(error, (TargetMissedError, EngineError)) else 2) from error
    except Exception as error:
        traceback.print_exc()
        typer.secho("error: this is a bug of ditfastattn; please report the above", err=True)
        raise SystemExit(70) from error


def one_screen(message: str) -> str:
    """Return ``message`` with its long lines cut in the middle: the remedy stays in sight."""
    half = _LONGEST // 2
    return "\n".join(
        line if len(line) <= _LONGEST else f"{line[:half]} ... {line[-half:]}"
        for line in message.splitlines()
    )


if __name__ == "__main__":
    run()
