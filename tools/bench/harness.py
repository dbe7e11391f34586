"""Measure contenders: each method's settings take turns with the compiled dense model.

A checkpoint keeps the finished methods.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.reports import summary
from ditfastattn.runtime.search.measure.contender import (
    Contender,
    dense_contender,
    planned_contender,
)
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.tools.bench.fidelity import fidelity
from ditfastattn.tools.bench.forms import Form
from ditfastattn.tools.bench.peer_forms import best_form, calibrated, compilations, contender_of
from ditfastattn.tools.bench.peers.base import Peer
from ditfastattn.tools.bench.plans import find_plans, flops_kept
from ditfastattn.tools.bench.setup import EAGER, OURS, Data, Group, Setup, failure

_DENSE_COMPILE = "dense-compile-seconds"


@dataclass(frozen=True)
class Entry:
    """A contender to measure, and what to record of it."""

    method: str
    setting: str
    form: str
    contender: Contender
    details: Mapping[str, Any]


class Bench:
    """Measure all contenders of a model."""

    def __init__(self, setup: Setup) -> None:
        """Take what the contenders share."""
        self.setup = setup
        self.dense_compile_seconds = float(setup.checkpoint.peek(_DENSE_COMPILE) or 0.0)
        self._dense: Contender | None = None

    def run(self) -> list[Group]:
        """Return one group per method: dense, ours, peers."""
        groups = [self._kept(EAGER, self._eager), self._kept(OURS, self._ours)]
        for peer in self.setup.options.peers:
            groups.append(self._kept(peer.name, partial(self._peer, peer)))
        return groups

    def _kept(self, method: str, make: Callable[[], Data]) -> Group:
        def timed() -> Data:
            began = time.monotonic()
            # Methods share neither compilations nor Dynamo's limit on them.
            torch._dynamo.reset()
            self._dense = None
            with many_compilations():
                made = make()
            return {"method": method, **made, "seconds": time.monotonic() - began}

        found: Data = self.setup.checkpoint.data(f"group-{method}", timed)
        return found

    def _eager(self) -> Data:
        contender = dense_contender(self.setup.pipeline, self.setup.prompts, Lowering.EAGER)
        return self._measure([Entry(EAGER, "", Form.EAGER, contender, {})])

    def _ours(self) -> Data:
        plans = find_plans(self.setup)
        measured = self._measure([self._planned(plan) for plan in plans])
        kept = {_setting(plan): flops_kept(plan) for plan in plans}
        for record in measured["lanes"]:
            record["details"] |= kept[record["setting"]]
        return measured

    def _planned(self, plan: Plan) -> Entry:
        options = self.setup.options
        form = Form.MODEL if options.compiled else Form.EAGER
        contender = planned_contender(
            self.setup.pipeline, plan, self.setup.prompts, options.lowering
        )
        details = {
            "plan": summary(plan),
            "variants": len(set(plan.strategies)),
            "predicted_speedup": plan.calibration.predicted_speedup,
        }
        return Entry(OURS, _setting(plan), form, contender, details)

    def _peer(self, peer: Peer) -> Data:
        failures: list[Data] = []
        try:
            calibration = calibrated(self.setup, peer)
        except Exception as error:  # another library's code: anything may be raised
            return {"lanes": [], "failures": [failure(peer.name, "calibration", error)]}
        form, forms = best_form(self.setup, peer, calibration)
        entries: list[Entry] = []
        for setting in peer.settings:
            try:
                contender = contender_of(self.setup, peer, setting, form, calibration)
            except Exception as error:
                failures.append(failure(peer.name, setting.label, error))
            else:
                details = dict(setting.options)
                entries.append(Entry(peer.name, setting.label, form, contender, details))
        measured = self._measure(entries)
        return {**measured, "failures": failures + measured["failures"], "forms": forms}

    def _measure(self, entries: Sequence[Entry]) -> Data:
        """Time ``entries`` in turns with the dense model, and compare all images with its."""
        warm: list[tuple[Entry, float]] = []
        failures: list[Data] = []
        dense, tell = self._dense_contender(), self.setup.tell
        for entry in entries:
            tell(f"{entry.method}: warming up {entry.setting or entry.form}")
            try:
                warm.append((entry, entry.contender.warm_up()))
            except Exception as error:
                failures.append(failure(entry.method, entry.setting, error))
        if not warm:
            return {"lanes": [], "failures": failures}
        tell(f"{warm[0][0].method}: timing {len(warm)} contenders and dense, in turns")
        calls = [entry.contender.generate for entry, _ in warm]
        repetitions = self.setup.options.repetitions
        timings = measure_turns(dense.generate, calls, repetitions, compilations)
        reference = dense.stacked()
        measured = [
            {
                "method": entry.method,
                "setting": entry.setting,
                "form": entry.form,
                "details": dict(entry.details),
                **asdict(fidelity(reference, entry.contender.stacked())),
                "speedup": asdict(timing.speedup),
                "seconds": asdict(timing.candidate),
                "dense_seconds": asdict(timing.baseline),
                "compile_seconds": compiled,
            }
            for (entry, compiled), timing in zip(warm, timings, strict=True)
        ]
        return {"lanes": measured, "failures": failures}

    def _dense_contender(self) -> Contender:
        if self._dense is None:
            setup = self.setup
            self._dense = dense_contender(setup.pipeline, setup.prompts, setup.options.lowering)
            setup.tell("warming up the dense model")
            self.dense_compile_seconds = self._dense.warm_up()
            setup.checkpoint.put(_DENSE_COMPILE, self.dense_compile_seconds)
        return self._dense


def _setting(plan: Plan) -> str:
    return f"drift {plan.calibration.strength:g}"
