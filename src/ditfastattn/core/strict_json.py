"""Read JSON strictly: bounded, of one meaning, and of nothing that could not be written again."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from pathlib import Path
from typing import Any, Final

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.files import open_regular, write_text_atomically

MOST_BYTES: Final = 256 * 2**20
_DEEPEST: Final = 64


def read_json(path: Path, what: str, remedy: str = "", *, most_bytes: int = MOST_BYTES) -> Any:
    """Return the JSON in the file ``path``; ``what`` names what it should be, as "the plan".

    Raises:
        FileError: there is no such file.
        ConfigError: it is too large, or not strict JSON.
    """
    return parse_json(read_text(path, what, remedy, most_bytes=most_bytes), str(path), what, remedy)


def read_text(path: Path, what: str, remedy: str = "", *, most_bytes: int = MOST_BYTES) -> str:
    """Return the UTF-8 text in the file ``path``; errors as in ``read_json``."""
    with open_regular(path, f"cannot read {what}", remedy) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise ConfigError(
            f"{what} is too large",
            where=str(path),
            got=f"more than {most_bytes} bytes",
            expected=f"at most {most_bytes} bytes",
            remedy=remedy,
        )
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{what} is not text in UTF-8", where=str(path), got=error, remedy=remedy
        ) from error


def parse_json(text: str, where: str, what: str, remedy: str = "", *, finite: bool = True) -> Any:
    """Return the JSON in ``text``: no key twice, nested little, and ``finite`` numbers alone.

    Raises:
        ConfigError: it is something else.
    """
    try:
        data = json.loads(
            text,
            object_pairs_hook=_unique,
            parse_constant=_refuse if finite else float,
            parse_float=_finite,
        )
        _check(data)
    except RecursionError as error:
        raise _not_strict(what, where, f"nested more than {_DEEPEST} deep", remedy) from error
    except ValueError as error:
        raise _not_strict(what, where, error, remedy) from error
    return data


def write_sealed(path: Path, data: Any) -> None:
    """Write JSON ``data`` that only we read again, with a hash that tells of any change.

    It may hold infinities, such as the PSNR of equal images.

    Raises:
        FileError: it cannot be written.
    """
    content = json.dumps(data)
    sealed = {"sha256": hashlib.sha256(content.encode()).hexdigest(), "content": content}
    write_text_atomically(path, json.dumps(sealed) + "\n")


def read_sealed(path: Path, what: str) -> Any:
    """Return what ``write_sealed`` wrote to ``path``; ``what`` names it, as "the checkpoint".

    Raises:
        ConfigError: it is missing, or was changed since.
    """
    sealed = read_json(path, what)
    content = sealed.get("content") if isinstance(sealed, dict) else None
    if not isinstance(content, str) or sealed != {
        "sha256": hashlib.sha256(content.encode()).hexdigest(),
        "content": content,
    }:
        raise ConfigError(f"{what} was changed since it was written", where=str(path))
    return parse_json(content, str(path), what, finite=False)


def _not_strict(what: str, where: str, got: object, remedy: str) -> ConfigError:
    return ConfigError(f"{what} is not JSON", where=where, got=got, remedy=remedy)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        key, times = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the key {key[:80]!a} occurs {times} times in one object")
    return found


def _refuse(constant: str) -> float:
    raise ValueError(f"{constant} is not JSON")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:80]} is too large for a number")
    return value


def _check(data: Any) -> None:
    """Raise ``ValueError`` for deep nesting, and for text that UTF-8 cannot write."""
    waiting = [(data, 1)]
    while waiting:
        item, depth = waiting.pop()
        if isinstance(item, str):
            item.encode()
        elif isinstance(item, (dict, list)):
            if depth > _DEEPEST:
                raise ValueError(f"nested more than {_DEEPEST} deep")
            inner = [*item, *item.values()] if isinstance(item, dict) else item
            waiting += [(part, depth + 1) for part in inner]
