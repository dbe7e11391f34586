"""Faults are survived: what follows is right, or an error of ours says what is wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tiers import slow_but

ROOT = Path(__file__).parents[2]
KINDS = [
    "export, ; calibrate, killed; entries; loads",
    "calibrate, disk; build; exporters; file; plan; engine or; field",
]


@pytest.mark.parametrize("kinds", slow_but((), KINDS))
def test_no_fault_ends_in_a_raw_error_or_a_wrong_result(kinds: str, tmp_path: Path) -> None:
    """In a process of its own, which others are forked from."""
    command = [sys.executable, "-m", "ditfastattn.tools.faults.run", "--only", kinds]
    command += ["--trials", "6", "--out", str(tmp_path / "faults.md")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    table = (tmp_path / "faults.md").read_text().splitlines()
    for kind in kinds.split("; "):
        assert any(kind in row for row in table)
    for row in table[6:]:
        trials, survived, raw, wrong = map(int, row.split("|")[2:6])
        assert trials == survived > 0 == raw == wrong
