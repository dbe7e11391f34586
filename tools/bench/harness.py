"""Measure lanes: each method's settings take turns with the compiled dense model.

What is finished is kept in a checkpoint, method by method.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._dynamo.utils import counters

from ditfastattn.core.errors import ConfigError
from ditfastattn.passes.plan.schema import Plan, Strategy
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.reports import summary
from ditfastattn.runtime.search.judge.metrics import image_psnr, image_ssim
from ditfastattn.runtime.search.judge.targets import Target
from ditfastattn.runtime.search.measure.lane import Lane, dense_lane, planned_lane
from ditfastattn.runtime.search.measure.latency import Objective
from ditfastattn.runtime.search.measure.session import open_session
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.runtime.search.methods import GlobalChooser, make_global
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.search import Found, Search, SearchOptions
from ditfastattn.runtime.specializations import reports
from ditfastattn.tools.bench.forms import Form, PeerLane, forms_of, fresh_copy, peer_lane
from ditfastattn.tools.bench.models import BenchModel
from ditfastattn.tools.bench.peers import Peer, Scope, Setting, Subject

OURS = "ditfastattn"
EAGER = "dense-eager"
MOST_PSNR = 99.0  # dB, where images are equal: JSON has no infinity
SAME_PSNR = 30.0  # dB to the eager form, below which a compiled form does something else
EQUALLY_FAST = 1.02
_FORM_REPETITIONS = 3
_BISECTIONS = 16
_DENSE_COMPILE = "dense-compile-seconds"

Data = dict[str, Any]  # JSON
Group = Mapping[str, Any]  # a method's lanes and failures, as JSON


@dataclass(frozen=True)
class BenchOptions:
    """Hold what to measure.

    Attributes:
        steps: sampler steps.
        peers: the methods to compare with.
        budgets: the strengths of our plans, as budgets of drift.
        fractions: more of our plans, by how much of the attention's FLOPs they keep at most.
        repetitions: timed generations of each lane, each of another prompt.
        max_variants: the cap on distinct step variants of our plans; 0 is none.
        lowering: what compiles; ``eager`` compiles nothing, and is for tests.
    """

    steps: int
    peers: tuple[Peer, ...]
    budgets: tuple[float, ...]
    repetitions: int = 10
    max_variants: int = 0
    lowering: Lowering = Lowering.INDUCTOR
    fractions: tuple[float, ...] = ()


@dataclass(frozen=True)
class Entry:
    """Hold a lane that is to be measured."""

    method: str
    setting: str
    form: str
    lane: Lane
    details: Mapping[str, Any]


@dataclass(frozen=True)
class Fidelity:
    """Compare images with dense ones of the same seeds; PSNR in dB, at most ``MOST_PSNR``."""

    ssim: float
    worst_ssim: float
    psnr: float
    ssims: tuple[float, ...]
    psnrs: tuple[float, ...]


def fidelity(dense: Tensor, images: Tensor) -> Fidelity:
    """Compare ``images`` with ``dense``, both ``[B, C, H, W]`` in [0, 1]."""
    ssims: list[float] = image_ssim(dense, images).tolist()
    psnrs = [min(value, MOST_PSNR) for value in image_psnr(dense, images).tolist()]
    mean = sum(ssims) / len(ssims)
    return Fidelity(mean, min(ssims), sum(psnrs) / len(psnrs), tuple(ssims), tuple(psnrs))


def compilations() -> int:
    """Return how many frames Dynamo has compiled, or tried to, in this process."""
    return int(counters["frames"]["total"])


class Bench:
    """Measure a model's lanes."""

    def __init__(
        self,
        model: BenchModel,
        options: BenchOptions,
        checkpoint: Checkpoint,
        tell: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Open the model; ``tell`` is told what is done next."""
        self.model, self.options = model, options
        self._checkpoint, self._tell = checkpoint, tell
        self.pipeline = model.open()
        self.prompts = model.test_prompts(options.repetitions, options.steps)
        self._compiled = options.lowering is Lowering.INDUCTOR
        self._dense: Lane | None = None
        self.dense_compile_seconds = float(checkpoint.peek(_DENSE_COMPILE) or 0.0)

    def run(self) -> list[Group]:
        """Return one group per method: dense, ours, peers."""
        groups = [self._kept(EAGER, self._eager), self._kept(OURS, self._ours)]
        for peer in self.options.peers:
            groups.append(self._kept(peer.name, partial(self._peer, peer)))
        return groups

    def _kept(self, method: str, make: Callable[[], Data]) -> Group:
        def timed() -> Data:
            began = time.monotonic()
            # No method is to run into the compilations of another, nor into Dynamo's limit on them.
            torch._dynamo.reset()
            self._dense = None
            with many_compilations():
                made = make()
            return {"method": method, **made, "seconds": time.monotonic() - began}

        found: Data = self._checkpoint.data(f"group-{method}", timed)
        return found

    def _eager(self) -> Data:
        lane = dense_lane(self.pipeline, self.prompts, Lowering.EAGER)
        return self._measure([Entry(EAGER, "", Form.EAGER, lane, {})])

    def _ours(self) -> Data:
        plans = self._plans()
        lanes = [
            Entry(
                OURS,
                f"drift {plan.calibration.strength:g}",
                Form.MODEL if self._compiled else Form.EAGER,
                planned_lane(self.pipeline, plan, self.prompts, self.options.lowering),
                {
                    "plan": summary(plan),
                    "variants": len(set(plan.strategies)),
                    "predicted_speedup": plan.calibration.predicted_speedup,
                },
            )
            for plan in plans
        ]
        measured = self._measure(lanes)
        kept = {f"drift {plan.calibration.strength:g}": _flops_kept(plan) for plan in plans}
        for lane in measured["lanes"]:
            lane["details"] |= kept[lane["setting"]]
        return measured

    def _plans(self) -> list[Plan]:
        """Return a plan per budget of drift and per fraction; those that come out alike once."""
        names = [f"plan-{budget:g}" for budget in self.options.budgets]
        names += [f"plan-attention-{fraction:g}" for fraction in self.options.fractions]
        kept = [self._checkpoint.peek(name) for name in names]
        if None in kept:  # a search that was killed goes on where it was
            kept = self._searched()
            for name, data in zip(names, kept, strict=True):
                self._checkpoint.put(name, data)
        plans = [Plan.parse(json.dumps(data)) for data in kept]
        return list({plan.strategies: plan for plan in plans}.values())

    def _searched(self) -> list[Data]:
        """Search them."""
        options, model = self.options, self.model
        self._tell("profiling, for our plans")
        prompts = model.calibration_prompts(options.steps)
        target = Target.min_ssim(0.9)  # its metric weighs the steps; the budgets set the strength
        with open_session(self.pipeline, prompts[0]) as session:
            work = Work(session, self._checkpoint, 0.0)
            chooser = make_global(work, prompts, target, Objective.LATENCY, options.max_variants)
            made = SearchOptions(target, max_variants=options.max_variants)
            search = Search(work, chooser, made, prompts, prompts)
            found = [Found(chooser.rows(budget), budget) for budget in options.budgets]
            found += [_keeping(chooser, work, fraction) for fraction in options.fractions]
            return [search.plan(item, 0.0).model_dump(mode="json") for item in found]

    def _peer(self, peer: Peer) -> Data:
        failures: list[Data] = []
        try:
            calibration = self._calibrated(peer)
        except Exception as error:  # another library's code: anything may come
            return {"lanes": [], "failures": [_failure(peer.name, "calibration", error)]}
        form, forms = self._best_form(peer, calibration)
        lanes: list[Entry] = []
        for setting in peer.settings:
            try:
                lane = self._lane(peer, setting, form, calibration)
            except Exception as error:
                failures.append(_failure(peer.name, setting.label, error))
            else:
                lanes.append(Entry(peer.name, setting.label, form, lane, dict(setting.options)))
        measured = self._measure(lanes)
        return {**measured, "failures": failures + measured["failures"], "forms": forms}

    def _lane(self, peer: Peer, setting: Setting, form: Form, calibration: Any) -> PeerLane:
        return peer_lane(
            self.model,
            self.pipeline,
            self.prompts,
            self.options.steps,
            peer,
            setting,
            form,
            calibration,
        )

    def _calibrated(self, peer: Peer) -> Any:
        if peer.calibrate is None:
            return None
        transformer = fresh_copy(self.pipeline.transformer)
        subject = Subject(transformer, self.options.steps, self.model.guided)
        prompts = self.model.calibration_prompts(self.options.steps)[:1]

        def generate(scope: Scope) -> None:
            PeerLane(self.pipeline, transformer, prompts, scope).generate(0)

        self._tell(f"calibrating {peer.name}")
        return peer.calibrate(subject, generate)

    def _best_form(self, peer: Peer, calibration: Any) -> tuple[Form, dict[Form, Data]]:
        """Return the form in which ``peer`` is fastest, at the middle of its sweep, and all forms.

        Each takes turns with the eager form. One counts if its image is the eager form's, but for
        the error of compilation. Of forms equally fast, the one that compiles fastest is taken.
        """
        setting = peer.settings[len(peer.settings) // 2]
        found: dict[Form, Data] = {}
        eager: PeerLane | None = None
        for form in forms_of(peer) if self._compiled else (Form.EAGER,):
            self._tell(f"{peer.name}: trying the form {form}")
            torch._dynamo.reset()  # what one form compiled, or gave up on, is no other's
            try:
                lane = self._lane(peer, setting, form, calibration)
                seconds = lane.warm_up()
                eager = eager or lane
                found[form] = {"compile_seconds": seconds, **_against(eager, lane)}
            except Exception as error:
                found[form] = {"failed": _reason(error)}
        torch._dynamo.reset()
        sound = [form for form in found if found[form].get("psnr_to_eager", 0.0) >= SAME_PSNR]
        if Form.EAGER not in sound:  # then no setting will run: each says why
            return Form.EAGER, found
        best = max(found[form]["speedup_over_eager"] for form in sound)
        tied = [f for f in sound if EQUALLY_FAST * found[f]["speedup_over_eager"] >= best]
        return min(tied, key=lambda form: found[form]["compile_seconds"]), found

    def _measure(self, entries: Sequence[Entry]) -> Data:
        """Time ``entries`` in turns with the dense lane, and compare all images with its."""
        lanes: list[tuple[Entry, float]] = []
        failures: list[Data] = []
        dense = self._dense_lane()
        for entry in entries:
            self._tell(f"{entry.method}: warming up {entry.setting or entry.form}")
            try:
                lanes.append((entry, entry.lane.warm_up()))
            except Exception as error:
                failures.append(_failure(entry.method, entry.setting, error))
        if not lanes:
            return {"lanes": [], "failures": failures}
        self._tell(f"{lanes[0][0].method}: timing {len(lanes)} lanes and dense, in turns")
        calls = [entry.lane.generate for entry, _ in lanes]
        timings = measure_turns(dense.generate, calls, self.options.repetitions, compilations)
        reference = dense.stacked()
        measured = [
            {
                "method": entry.method,
                "setting": entry.setting,
                "form": entry.form,
                "details": dict(entry.details),
                **asdict(fidelity(reference, entry.lane.stacked())),
                "speedup": asdict(timing.speedup),
                "seconds": asdict(timing.candidate),
                "dense_seconds": asdict(timing.baseline),
                "compile_seconds": compiled,
            }
            for (entry, compiled), timing in zip(lanes, timings, strict=True)
        ]
        return {"lanes": measured, "failures": failures}

    def _dense_lane(self) -> Lane:
        if self._dense is None:
            self._dense = dense_lane(self.pipeline, self.prompts, self.options.lowering)
            self._tell("warming up the dense model")
            self.dense_compile_seconds = self._dense.warm_up()
            self._checkpoint.put(_DENSE_COMPILE, self.dense_compile_seconds)
        return self._dense


def _keeping(chooser: GlobalChooser, work: Work, fraction: float) -> Found:
    """Return the gentlest plan found that keeps at most ``fraction`` of the attention's FLOPs."""
    merged = chooser.most > 0
    full = [(Strategy.FULL,) * len(work.session.sites)] * work.session.steps
    dense = work.variants.flops(full, merged).attention
    low, high = 0.0, chooser.first or 1.0
    best: Found | None = None
    for _ in range(_BISECTIONS):
        strength = high if best is None else (low + high) / 2
        rows = chooser.rows(strength)
        if work.variants.flops(rows, merged).attention <= fraction * dense:
            best, high = Found(rows, strength), strength
        else:
            low, high = strength, (2 * high if best is None else high)
    if best is None:
        raise ConfigError(
            "no plan keeps so little of the attention",
            where="--fractions",
            got=fraction,
            remedy="ask for more steps, or keep more",
        )
    return best


def _flops_kept(plan: Plan) -> Data:
    """Return the fractions of a dense generation's FLOPs that ``plan`` runs, once compiled."""
    report = next(report for report in reports() if report.plan == plan)
    assert report.planned is not None  # it has generated
    return {
        "attention_flops": report.planned.attention / report.dense.attention,
        "matrix_flops": report.planned.total / report.dense.total,
    }


def _against(eager: Lane, lane: Lane) -> Data:
    """Return how a form compares with the eager one, which is its own equal."""
    psnr = min(float(image_psnr(eager.images[0], lane.images[0]).mean()), MOST_PSNR)
    if lane is eager:
        return {"psnr_to_eager": psnr, "speedup_over_eager": 1.0}
    (timing,) = measure_turns(eager.generate, [lane.generate], _FORM_REPETITIONS, compilations)
    return {"psnr_to_eager": psnr, "speedup_over_eager": timing.speedup.median}


def _failure(method: str, setting: str, error: Exception) -> Data:
    return {"method": method, "setting": setting, "reason": _reason(error)}


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
