"""Read the environment knobs: every ``DITFASTATTN_*`` variable is declared, typed and checked here.

| variable              | meaning                                                   | default |
|-----------------------|-----------------------------------------------------------|---------|
| `DITFASTATTN_DUMP`    | folder for the graphs before and after each pass          | none    |
| `DITFASTATTN_DISABLE` | passes to switch off, with those that require them: `a,b` | none    |
| `DITFASTATTN_FUEL`    | let only so many sites of a variant take their strategy   | -1: all |
| `DITFASTATTN_VERIFY`  | 1: check the graph after each pass; 0: do not             | 1       |
"""

from __future__ import annotations

import os
import re
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ditfastattn.core.errors import ConfigError

PREFIX = "DITFASTATTN_"
DUMP = PREFIX + "DUMP"
DISABLE = PREFIX + "DISABLE"
FUEL = PREFIX + "FUEL"
VERIFY = PREFIX + "VERIFY"
VARIABLES = (DUMP, DISABLE, FUEL, VERIFY)

UNLIMITED_FUEL = -1

_FUEL_PATTERN = re.compile(r"-1|[0-9]{1,18}")
_SWITCH = {"0": False, "1": True}


@dataclass(frozen=True)
class Knobs:
    """Hold the knobs of one compilation; an unset or empty variable leaves its default."""

    dump: str = ""  # empty: no graphs are written
    disabled: tuple[str, ...] = ()  # in the order given, each once
    fuel: int = UNLIMITED_FUEL
    verify: bool = True


def read_knobs(environ: Mapping[str, str] = os.environ) -> Knobs:
    """Read the knobs as they stand now.

    Whether a name in ``disabled`` is a pass is for the pipeline to say: it owns the names.

    Raises:
        ConfigError: a value cannot be read, or a variable with our prefix is not one of ours.
    """
    _refuse_unknown_variables(environ)
    return Knobs(
        dump=_folder(DUMP, environ.get(DUMP, "")),
        disabled=_names(DISABLE, environ.get(DISABLE, "")),
        fuel=_fuel(FUEL, environ.get(FUEL, "")),
        verify=_switch(VERIFY, environ.get(VERIFY, "")),
    )


@contextmanager
def limited_fuel(fuel: int) -> Generator[None]:
    """Let only the first ``fuel`` sites of a variant take their strategy, in this process."""
    before = os.environ.get(FUEL)
    os.environ[FUEL] = str(fuel)
    try:
        yield
    finally:
        if before is None:
            del os.environ[FUEL]
        else:
            os.environ[FUEL] = before


def _refuse_unknown_variables(environ: Mapping[str, str]) -> None:
    unknown = sorted(name for name in environ if name.startswith(PREFIX) and name not in VARIABLES)
    if unknown:
        raise ConfigError(
            "unknown environment variable",
            where=unknown[0],
            got=", ".join(unknown),
            expected="one of " + ", ".join(VARIABLES),
            remedy=f"unset {unknown[0]}, or correct its name",
        )


def _folder(variable: str, value: str) -> str:
    folder = value.strip()
    if folder and Path(folder).exists() and not Path(folder).is_dir():
        raise ConfigError(
            "not a folder",
            where=variable,
            got=folder,
            expected="a folder, or a path where one can be made",
        )
    return folder


def _names(variable: str, value: str) -> tuple[str, ...]:
    if not value.strip():
        return ()
    names = tuple(name.strip() for name in value.split(","))
    if not all(names):
        raise ConfigError(
            "empty pass name",
            where=variable,
            got=repr(value),
            expected="names of passes, separated by single commas",
        )
    return tuple(dict.fromkeys(names))


def _fuel(variable: str, value: str) -> int:
    text = value.strip()
    if not text:
        return UNLIMITED_FUEL
    if not _FUEL_PATTERN.fullmatch(text):
        raise ConfigError(
            "not a number of rewrites",
            where=variable,
            got=repr(value),
            expected="an integer, 0 or more, or -1 for no limit",
        )
    return int(text)


def _switch(variable: str, value: str) -> bool:
    text = value.strip()
    if not text:
        return Knobs.verify
    if text not in _SWITCH:
        raise ConfigError("not a switch", where=variable, got=repr(value), expected="0 or 1")
    return _SWITCH[text]
