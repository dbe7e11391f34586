"""Run the command line as a shell does, in this process."""

from __future__ import annotations

import pytest

from ditfastattn.tools.commands import app as cli


def exit_code(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    """Return the exit code of ``ditfastattn`` with ``arguments``."""
    monkeypatch.setattr("sys.argv", ["ditfastattn", *map(str, arguments)])
    with pytest.raises(SystemExit) as stopped:
        cli.run()
    return stopped.value.code if isinstance(stopped.value.code, int) else 0
