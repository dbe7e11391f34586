"""What README and docs/ tell people to type exists, and their prose avoids a list of phrases."""

from __future__ import annotations

import ast
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import typer.main

import ditfastattn
from ditfastattn.tools.commands.app import app

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = [*PAGES, *(ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md"))]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
STILTED = {  # what reads as if translated, and what to write instead
    r"\b(is|are) no (multiple|square|path|hindrance|photograph|graph|site)\b": "is not a ...",
    r"\banew\b": "again",
    r"\bwhoever\b": "say who",
    r", it goes on\b": "resumes",
    r"\btells sites\b": "reports sites",
    r"\bcame with another\b": "unexpected ...",
    r"\bis for something else\b": "does not match",
    r"\bleaves? (it|them) be\b": "does not change",
}


def blocks(language: str) -> list[Any]:
    found = []
    for page in PAGES:
        for number, match in enumerate(_BLOCK.finditer(page.read_text(encoding="utf-8"))):
            if match[1] == language:
                found.append(pytest.param(match[2], id=f"{page.name}-{number}"))
    return found


@pytest.mark.parametrize("code", blocks("python"))
def test_python_parses_and_names_what_exists(code: str) -> None:
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute):
            dotted = ast.unparse(node)
            if re.fullmatch(r"ditfastattn(\.\w+)+", dotted) and ".tools." not in dotted:
                found: Any = ditfastattn
                for name in dotted.split(".")[1:]:
                    found = getattr(found, name)


def commands(block: str) -> list[list[str]]:
    lines = block.replace("\\\n", " ").splitlines()
    parts = [part for line in lines for part in [*shlex.split(line, comments=True), ";"]]
    found: list[list[str]] = [[]]
    for part in parts:
        if part in {";", "&&", "|"}:
            found.append([])
        else:
            found[-1].append(part)
    return [command[1:] for command in found if command[:1] == ["ditfastattn"]]


@pytest.mark.parametrize("block", blocks(""))
def test_commands_and_their_options_exist(block: str) -> None:
    root: Any = typer.main.get_command(app)
    for words in commands(block):
        command: Any = root
        while getattr(command, "commands", None):
            command = command.commands[words.pop(0)]
        known = {option for parameter in command.params for option in parameter.opts}
        assert {word.split("=")[0] for word in words if word.startswith("--")} <= known | {"--help"}


@pytest.mark.parametrize("page", [page for page in PROSE if page.exists()], ids=lambda p: p.name)
def test_prose_avoids_what_reads_as_translated(page: Path) -> None:
    text = re.sub(r"\s+", " ", page.read_text(encoding="utf-8"))
    found = {
        match[0]: say for phrase, say in STILTED.items() for match in re.finditer(phrase, text)
    }
    assert not found
