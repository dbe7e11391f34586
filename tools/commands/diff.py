"""``ditfastattn diff``: where two plans differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.tools.commands.options import Json
from ditfastattn.tools.plan_difference import Difference, plan_difference
from ditfastattn.tools.terminal import open_console, print_json

_MOST_SHOWN = 40

First = Annotated[Path, typer.Argument(help="A plan's file.")]
Second = Annotated[Path, typer.Argument(help="Another plan's file.")]


def diff(before: First, after: Second, as_json: Json = False) -> None:
    """Show where two plans differ. Exit with 1 if they do."""
    found = plan_difference(Plan.load(before), Plan.load(after))
    show_difference(open_console(stderr=as_json), found)
    if as_json:
        print_json({"same": found.same, **asdict(found)})
    raise typer.Exit(0 if found.same else 1)


def show_difference(console: Console, found: Difference) -> None:
    """Print the fields and the entries that differ."""
    if found.fields:
        table = Table(title="what the plans are for")
        for heading in ("field", "first", "second"):
            table.add_column(heading)
        for name, pair in found.fields.items():
            table.add_row(name, *(each if len(each) < 60 else f"{each[:57]}..." for each in pair))
        console.print(table)
    if found.entries:
        turns = Counter((each.before or "absent", each.after or "absent") for each in found.entries)
        table = Table(title=f"{len(found.entries)} of {found.compared} entries differ")
        for heading in ("first", "second"):
            table.add_column(heading)
        table.add_column("entries", justify="right")
        for (before, after), count in turns.most_common():
            table.add_row(before, after, str(count))
        console.print(table)
        for each in found.entries[:_MOST_SHOWN]:
            before, after = each.before or "absent", each.after or "absent"
            console.print(f"step {each.step}, {each.site}: {before} -> {after}", soft_wrap=True)
        if len(found.entries) > _MOST_SHOWN:
            console.print(f"and {len(found.entries) - _MOST_SHOWN} more (--json lists them)")
    if found.same:
        console.print("the plans do the same for the same model and sampler")
