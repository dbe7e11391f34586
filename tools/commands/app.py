"""Assemble the ``ditfastattn`` command from its subcommands, one file each, and run it."""

from __future__ import annotations

import logging
from typing import Annotated

import typer
from rich.logging import RichHandler

from ditfastattn.core.errors import ConfigError, EngineError, TargetMissedError
from ditfastattn.tools.commands.bench import bench
from ditfastattn.tools.commands.build import build
from ditfastattn.tools.commands.calibrate import calibrate
from ditfastattn.tools.commands.demo import demo
from ditfastattn.tools.commands.doctor import doctor
from ditfastattn.tools.commands.export import export
from ditfastattn.tools.commands.inspect import inspect
from ditfastattn.tools.commands.update_weights import update_weights
from ditfastattn.tools.commands.validate import validate
from ditfastattn.tools.commands.verify import verify
from ditfastattn.tools.terminal import open_console

COMMANDS = (
    demo,
    calibrate,
    inspect,
    validate,
    export,
    build,
    verify,
    update_weights,
    doctor,
    bench,
)

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
        no_args_is_help=True,
        pretty_exceptions_enable=False,
    )
    app.callback()(set_up_logging)
    for command in COMMANDS:
        app.command()(command)
    return app


app = assembled()


def run() -> None:
    """Run the command; exit with 1 for a missed target or a failed engine, 2 for a user's error."""
    try:
        app()
    except (ConfigError, EngineError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        raise SystemExit(1 if isinstance(error, (TargetMissedError, EngineError)) else 2) from error


if __name__ == "__main__":
    run()
