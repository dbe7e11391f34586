"""The page of what works: one row a class, reasons below, read back to keep rows.

It is docs/compatibility.md, which ``survey.py`` writes.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import diffusers
import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.tools.zoo.trial import HALF_TOLERANCE, TOLERANCE

_LEGEND = """\
# Which models work

Written by `python -m ditfastattn.tools.survey`; do not edit. Every transformer of diffusers
{diffusers} is built tiny with random weights (torch {torch}, CPU, fp32), captured by
`torch.compile(..., backend="ditfastattn", fullgraph=True)`, or traced where that fails, run by a
plan that mixes every legal strategy at every site, and compared with the plan interpreter, as is
the same plan over the graph of `torch.export`, which must have the same sites, and the bundle
exported to ONNX.

*Attention* counts the attention sites by kind, *feed-forward* the feed-forward sites. *Strategies*
are those that some attention may take: **w**indow, share-**s**tep, share-**c**fg, **e**xtrapolate.
*Graph breaks* counts the breaks of Dynamo without `fullgraph` (-: it makes no graph). A model with
any is traced with its inputs; its graph holds for what it reads of them, which is checked.
*Error*, *torch.export* and *ONNX* are the largest differences, relative to the largest output (at
most {tolerance:g}). The reasons for what is declined are listed below the table, with what a
traced model reads.

| class | attention | feed-forward | strategies | graph breaks | error | torch.export | ONNX |
|---|---|---|---|---|---|---|---|
"""
_PIPELINES = """\
## Pipelines

What the tests run whole pipelines with, tiny and with random weights: by a plan, compared with the
plan interpreter, the dense pipeline or the exported bundle. Each *yes* leads to its test; *-*: not
tried. *img2img* begins with an image, or a video with its first frame; *control* is a ControlNet;
*LoRA* loads an adapter from a file; *two-call guidance* calls the transformer twice a step; *ONNX*
is a bundle that ONNX Runtime runs, *loop* one with the sampler inside. Written by
`python -m tests.exercises`.

<!-- pipelines -->
{rows}<!-- end of pipelines -->
"""
ROUNDS = "computes in half precision"  # how the note on such a model begins
_COLUMNS = (
    *("class", "attention", "feed-forward", "strategies", "graph breaks"),
    *("error", "torch.export", "ONNX"),
)
_EXPLAINED_BY = {  # how the note begins that says why a column has none
    "attention": "declined: ",
    "strategies": "declined: ",
    "graph breaks": "Dynamo",
    "torch.export": "no torch.export: ",
    "ONNX": "no ONNX: ",
}
#: The rows of the pipelines' table within the page; tests/exercises.py writes them.
PIPELINES = re.compile(r"(?<=<!-- pipelines -->\n)[\s\S]*(?=<!-- end of pipelines -->\n)")


@dataclass(frozen=True)
class Entry:
    """What the page says about one class: its row of the table, and notes."""

    row: str
    notes: tuple[str, ...] = ()

    @property
    def works(self) -> bool:
        """Tell whether the class has sites and runs a plan correctly."""
        error = self.row.split(" | ")[5]
        rounds = any(note.startswith(ROUNDS) for note in self.notes)
        return error != "-" and float(error) <= (HALF_TOLERANCE if rounds else TOLERANCE)

    @property
    def unexplained(self) -> list[str]:
        """Return the columns that have none, and no note that says why.

        Where no plan has run, one note is for all of them.
        """
        cells = dict(zip(_COLUMNS, self.row.strip("| ").split(" | "), strict=False))
        blank = [column for column, cell in cells.items() if cell == "-"]
        if "error" in blank:
            return [] if self.notes else blank
        return [
            column
            for column in blank
            if not any(note.startswith(_EXPLAINED_BY[column]) for note in self.notes)
        ]


def as_markdown(entries: Mapping[str, Entry], pipelines: str = "") -> str:
    """Return the whole page for the classes in ``entries``, by name, with rows of ``pipelines``.

    Raises:
        ConfigError: a column has none, and no note says why.
    """
    for name, found in entries.items():
        if found.unexplained:
            raise ConfigError(
                "the survey has no result, and no reason why",
                where=name,
                got="-",
                expected=f"a note on {', '.join(found.unexplained)}",
                remedy="let the trial say why, in tools/zoo/trial.py",
            )
    works = sum(found.works for found in entries.values())
    lines = [entries[name].row for name in sorted(entries)]
    lines += [f"\n{works} of {len(entries)} classes run a plan.\n"]
    lines += [_PIPELINES.format(rows=pipelines), "## Reasons\n"]
    for name in sorted(entries):
        if entries[name].notes:
            lines += [f"- **{name}**", *(f"  - {note}" for note in entries[name].notes)]
    return head() + "\n".join(lines) + "\n"


def head() -> str:
    """Return the head of the page: how to read it, and the releases it is valid for."""
    return _LEGEND.format(
        diffusers=diffusers.__version__,
        torch=torch.__version__.partition("+")[0],
        tolerance=TOLERANCE,
    )


def rows_of_pipelines(page: str) -> str:
    """Return the rows of the pipelines' table in ``page``, "" where it has none."""
    found = PIPELINES.search(page)
    return found[0] if found else ""


def read_page(path: Path) -> dict[str, Entry]:
    """Return what the page in ``path`` says about each class.

    Raises:
        ConfigError: the page was written with other releases, or in another format.
    """
    page = path.read_text()
    if not page.startswith(head()):
        raise ConfigError(
            "the page was written with other releases, or in another format",
            where=str(path),
            expected=f"diffusers {diffusers.__version__}, torch {torch.__version__}",
            remedy="survey all classes: leave out --only",
        )
    table, _, reasons = page.removeprefix(head()).partition("\n\n")
    rows = {line.split(" ")[1]: line for line in table.splitlines()}
    blocks = re.findall(r"^- \*\*(\w+)\*\*\n((?:  - .*\n)*)", reasons, re.MULTILINE)
    said = {name: tuple(re.findall("^  - (.*)$", lines, re.M)) for name, lines in blocks}
    return {name: Entry(line, said.get(name, ())) for name, line in rows.items()}
