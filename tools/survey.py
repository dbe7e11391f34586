"""Try every transformer that diffusers exports, and write the table of what works.

    python -m ditfastattn.tools.survey --out docs/compatibility.md

Every class is tried at a tiny size with random weights: its sites, a plan that mixes all strategies
against the plan interpreter, the same plan over the graph of torch.export, and the exported bundle
in ONNX Runtime. With ``--only`` the rows of other classes are kept.
"""

from __future__ import annotations

import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import diffusers
import typer
from rich.console import Console

from ditfastattn.core.files import write_text_atomically
from ditfastattn.passes.analysis.site import SiteKind
from ditfastattn.passes.plan.legality import declined_strategies
from ditfastattn.passes.plan.strategies import Strategy
from ditfastattn.tools.survey_page import ROUNDS, Entry, as_markdown, read_page, rows_of_pipelines
from ditfastattn.tools.terminal import open_console
from ditfastattn.tools.zoo import ZOO
from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.trial import (
    HALF_TOLERANCE,
    Trial,
    count_graph_breaks,
    reason_of,
    try_model,
)

_EXPORTED = re.compile(r".*(Transformer|DiT).*(Model|Transformer)")
_NOT_DENOISERS = re.compile(r".*ControlNet.*|.*Prior.*|.*Encoder.*")
_NO_DENOISERS = {
    "TransformerTemporalModel": "it is a part of U-Nets for video, the attention over time between "
    "their convolutions, and denoises nothing by itself",
}
_LETTERS = {
    Strategy.WINDOW: "w",
    Strategy.SHARE_STEP: "s",
    Strategy.SHARE_CFG: "c",
    Strategy.EXTRAPOLATE: "e",
}


@dataclass(frozen=True)
class Outcome:
    """The result for one class: a trial, or why there is none.

    ``breaks`` counts its graph breaks; -1: Dynamo makes no graph.
    """

    name: str
    trial: Trial | None
    reason: str = ""
    breaks: int = -1


def entry(outcome: Outcome) -> Entry:
    """Return what the page says about ``outcome``."""
    return Entry(row(outcome), tuple(notes(outcome)))


def exported_classes() -> list[str]:
    """Return the names of the denoising transformers that diffusers exports."""
    names = (name for name in dir(diffusers) if _EXPORTED.fullmatch(name))
    return sorted(name for name in names if not _NOT_DENOISERS.fullmatch(name))


def survey(console: Console, onnx: bool, only: str = "") -> list[Outcome]:
    """Try every class; report those without a tiny configuration as such."""
    known = {model.name: model for model in ZOO}
    outcomes: list[Outcome] = []
    for name in exported_classes():
        if re.search(only, name):
            outcomes.append(_outcome(name, known.get(name), onnx))
            console.print(row(outcomes[-1]), soft_wrap=True, highlight=False)
    return outcomes


def _outcome(name: str, model: ZooModel | None, onnx: bool) -> Outcome:
    if name in _NO_DENOISERS:
        return Outcome(name, None, _NO_DENOISERS[name])
    if model is None:
        return Outcome(name, None, "it has no tiny configuration yet")
    breaks = _breaks(model)
    try:
        return Outcome(name, try_model(model, onnx=onnx, program=True), breaks=breaks)
    except Exception as error:  # a survey reports every failure
        logging.getLogger(__name__).debug("%s", name, exc_info=True)
        reason = f"{type(error).__name__}: {reason_of(error)}"
        return Outcome(name, None, reason, breaks)


def _breaks(model: ZooModel) -> int:
    try:
        return count_graph_breaks(model)
    except Exception:  # of Dynamo; the trial fails for the same reason
        logging.getLogger(__name__).debug("%s", model.name, exc_info=True)
        return -1


def row(outcome: Outcome) -> str:
    """Return the row of the table."""
    trial = outcome.trial
    breaks = "-" if outcome.breaks < 0 else outcome.breaks
    if trial is None:
        return f"| {outcome.name} | - | - | - | {breaks} | - | - | - |"
    kinds = Counter(
        f"{site.kind} over {site.axes}" if site.axes else str(site.kind)
        for site in trial.report.sites
        if site.kind is not SiteKind.FEED_FORWARD
    )
    attentions = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    forwards = trial.kinds[SiteKind.FEED_FORWARD]
    letters = "".join(letter for strategy, letter in _LETTERS.items() if strategy in trial.legal)
    program, onnx = map(_rounded, (trial.program_error, trial.onnx_error))
    error = f"{trial.error:.0e}" if trial.report.sites else "-"
    return (
        f"| {outcome.name} | {attentions or '-'} | {forwards} | {letters or '-'} | {breaks} "
        f"| {error} | {program} | {onnx} |"
    )


def _rounded(error: float | None) -> str:
    return "-" if error is None else f"{error:.0e}"


def notes(outcome: Outcome) -> list[str]:
    """Return what the table omits, each reason once."""
    if outcome.trial is None:
        return [outcome.reason]
    found = [f"traced; reads {read}" for read in dict.fromkeys(outcome.trial.guards)]
    found += [f"called as it is: {path}: {why}" for path, why in outcome.trial.opaque.items()]
    found += [f"declined: {reason}" for reason in _reasons(outcome.trial)]
    if outcome.breaks < 0:
        found.append("Dynamo makes no graph of it, and gives up")
    if not outcome.trial.report.sites:
        found.append("no plan: the graph has no attention, and no feed-forward behind one")
        return found
    found += [f"bands only at {reason}" for reason in _bands_only(outcome.trial)]
    if outcome.trial.in_half:
        found.append(f"{ROUNDS}: errors up to {HALF_TOLERANCE:g} are its rounding")
    if outcome.trial.program_error is None:
        found.append(f"no torch.export: {outcome.trial.no_program or 'not tried'}")
    if outcome.trial.fixed_batch:
        found.append(f"ONNX at a fixed batch: {outcome.trial.fixed_batch}")
    if outcome.trial.onnx_error is None:
        found.append(f"no ONNX: {outcome.trial.no_onnx or 'not tried'}")
    return found


def _reasons(trial: Trial) -> list[str]:
    declined = [item.reason for item in trial.report.declined]
    strategies = [
        f"{strategy} at {site.kind}: {reason}"
        for site in trial.report.sites
        for strategy, reason in declined_strategies(site).items()
        if strategy in (Strategy.WINDOW, Strategy.SHARE_CFG)
        and site.kind is not SiteKind.FEED_FORWARD
    ]
    return list(dict.fromkeys([*declined, *strategies]))


def _bands_only(trial: Trial) -> list[str]:
    """Return why windows are not tiles, each reason once."""
    sites = [site for site in trial.report.sites if site.windows and site.no_grid]
    return list(dict.fromkeys(f"{site.kind}: {site.no_grid}" for site in sites))


def main(
    out: Annotated[Path | None, typer.Option(help="Write the table as Markdown.")] = None,
    onnx: Annotated[
        bool, typer.Option(help="Also export each, and run it in ONNX Runtime.")
    ] = True,
    only: Annotated[str, typer.Option(help="Regular expression for the classes to try.")] = "",
) -> None:
    """Try every transformer that diffusers exports."""
    console = open_console()
    known = read_page(out) if only and out is not None and out.exists() else {}
    outcomes = survey(console, onnx, only)
    for outcome in outcomes:
        for note in notes(outcome):
            console.print(f"{outcome.name}: {note}", soft_wrap=True)
    if out is not None:
        entries = known | {outcome.name: entry(outcome) for outcome in outcomes}
        pipelines = rows_of_pipelines(out.read_text()) if out.exists() else ""
        write_text_atomically(out, as_markdown(entries, pipelines))
        console.print(f"wrote {out}")


if __name__ == "__main__":
    typer.run(main)
