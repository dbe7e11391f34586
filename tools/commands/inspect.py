"""``ditfastattn inspect``: show a plan in the terminal."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.passes.plan.strategies import Strategy, every_strategy
from ditfastattn.tools.commands.generation import Generation, open_pipeline
from ditfastattn.tools.commands.options import (
    CallArguments,
    Classes,
    Device,
    Json,
    PipelineName,
    PlanFile,
    Prompts,
)
from ditfastattn.tools.terminal import open_console, print_json

GraphFolder = Annotated[
    Path | None,
    typer.Option(help="Folder for a step's graph before and after each pass, as text and SVG."),
]
GraphStep = Annotated[int, typer.Option(min=0, help="The step whose graph --graph writes.")]


def inspect(
    plan: PlanFile,
    graph: GraphFolder = None,
    step: GraphStep = 1,
    pipeline: PipelineName = "",
    classes: Classes = "3",
    prompts: Prompts = None,
    call: CallArguments = "",
    device: Device = "",
    as_json: Json = False,
) -> None:
    """Show what a plan is for and what it does at each step.

    With --graph, also what each pass makes of a step's graph, on the plan's model.
    """
    loaded, console = Plan.load(plan), open_console(stderr=as_json)
    data: dict[str, Any] = {"plan": loaded.model_dump(mode="json"), "changed": loaded.changed}
    show_plan(console, loaded, str(plan))
    if graph is not None:
        from ditfastattn.tools.commands.inspect_graph import write_graphs  # loads matplotlib

        opened = open_pipeline(pipeline, loaded.model.dtype, device)
        arguments = Generation(call=call).arguments(opened, classes, prompts)
        data["passes"] = write_graphs(console, opened, loaded, arguments, step, graph)
    if as_json:
        print_json(data)


def show_plan(console: Console, plan: Plan, name: str) -> None:
    """Print what ``plan`` is for, and its strategy per site and step."""
    console.print(facts(plan, name))
    console.print(strategy_table(plan))
    legend = Text("legend: ")
    used = {strategy for row in plan.strategies for strategy in row}
    for strategy in (each for each in every_strategy() if each in used):
        legend.append(f" {strategy.symbol} ", style=f"bold {strategy.terminal_colour}")
        legend.append(f"{strategy}  ")
    console.print(legend)


def facts(plan: Plan, name: str) -> Table:
    """Return what the plan is for and how it was found."""
    table = Table(title=name, show_header=False)
    table.add_column()
    table.add_column()
    sampler, calibration = plan.sampler, plan.calibration
    table.add_row("sampler", f"{sampler.scheduler or 'not recorded'}, {sampler.steps} steps")
    table.add_row("guidance", f"{sampler.guidance_scale}, {sampler.cfg_layout}")
    table.add_row("inputs", ", ".join(f"{key} {list(size)}" for key, size in plan.inputs.items()))
    table.add_row("model", f"structure {plan.model.structure}")
    table.add_row("", f"weights {plan.model.weights}, {plan.model.dtype}")
    if plan.model.lora:
        table.add_row("", f"LoRA {plan.model.lora}")
    table.add_row("calibration", f"{calibration.method}, strength {calibration.strength:.3g}")
    table.add_row(
        "", f"seed {calibration.seed}, batch {calibration.batch}, {calibration.seconds:.0f} s"
    )
    if calibration.target is not None:
        sign = ">=" if calibration.target.at_least else "<="
        table.add_row("target", f"{calibration.target.name} {sign} {calibration.target.bound:g}")
    for name, measured in (("", calibration.calibrated), ("held out", calibration.held_out)):
        if measured is not None:
            table.add_row(
                name, f"worst of {measured.prompts}: {measured.worst:.4g}, mean {measured.mean:.4g}"
            )
    if calibration.cache_bytes:
        kept = sorted({site.cache_dtype or plan.model.dtype for site in plan.sites})
        taken = f"{calibration.cache_bytes / 2**20:.1f} MiB at batch {calibration.batch}"
        table.add_row("caches", f"at most {taken}, in {', '.join(kept)}")
    if calibration.predicted_speedup is not None:
        table.add_row("speedup", f"{calibration.predicted_speedup:.2f}x predicted")
    if calibration.measured_speedup is not None:
        table.add_row("", f"{calibration.measured_speedup:.2f}x measured on {calibration.device}")
    return table


def strategy_table(plan: Plan) -> Table:
    """Return a row per site: a symbol per step, and the share of steps that skip work."""
    table = Table(title=f"{plan.changed} of {len(plan.sites) * plan.sampler.steps} take a shortcut")
    table.add_column("site")
    table.add_column("kind")
    table.add_column("window", justify="right")
    table.add_column("steps 0 ...")
    table.add_column("full", justify="right")
    for index, site in enumerate(plan.sites):
        column = [row[index] for row in plan.strategies]
        line = Text()
        for strategy in column:
            line.append(strategy.symbol, style=strategy.terminal_colour)
        full = Counter(column)[Strategy.FULL] / len(column)
        band = f"+-{site.window}" if site.window else "-"
        window = band if isinstance(site.window, int) else str(site.window)
        table.add_row(site.name, site.kind, window, line, f"{full:.0%}")
    return table
