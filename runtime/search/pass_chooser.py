"""The ``greedy`` and ``per-step`` methods: each plan takes a progressive pass over a generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ditfastattn.passes.plan.strategies import names_of, strategy_named
from ditfastattn.runtime.pipeline.prompts import Prompt, split_prompts
from ditfastattn.runtime.search.measure.latency import CostTable
from ditfastattn.runtime.search.measure.session import Session, open_session
from ditfastattn.runtime.search.methods import Method
from ditfastattn.runtime.search.record.work import Work
from ditfastattn.runtime.search.solve.greedy import GreedyCalibrator, Progress
from ditfastattn.runtime.search.solve.per_step import PerStepCalibrator
from ditfastattn.runtime.search.solve.rows import Row


@dataclass
class PassChooser:
    """Choose strategies by a progressive pass: ``greedy`` (V1) or ``per-step`` (V2).

    The pass runs all calibration prompts as the one batch ``batch``.
    """

    work: Work
    batch: Prompt
    costs: CostTable
    method: Method
    first: float
    tries: int = 6
    order: float = 1.0
    predicts: bool = False

    def rows(self, strength: float) -> list[Row]:
        """Run a pass at this threshold or budget; an interrupted one resumes."""
        checkpoint, session = self.work.checkpoint, self.work.session
        name = f"{self.method}-pass-{strength:.9g}"
        rows: list[Row] = [tuple(map(strategy_named, row)) for row in checkpoint.peek(name) or ()]
        if len(rows) == session.steps:
            return rows

        def keep(row: Row) -> None:
            rows.append(row)
            checkpoint.put(name, names_of(rows))

        self.work.begin(f"a {self.method} pass at strength {strength:.3g}")
        opening = open_session(
            session.pipeline,
            self.batch,
            session.layout,
            session.timestep,
            attention_only=True,
            head_groups=session.head_groups,
            only=session.only,
        )
        run = self._run_greedy if self.method is Method.GREEDY else self._run_per_step
        with opening as batched:
            run(batched, strength, list(rows), keep)
            self.work.note(batched.timesteps)
        return rows

    @property
    def _images(self) -> int:
        return len(split_prompts(self.batch.call, self.batch.seed))

    def _run_greedy(
        self, batched: Session, threshold: float, known: Sequence[Row], keep: Callable[[Row], None]
    ) -> None:
        work, before, images = self.work, self.work.forwards, self._images

        def report(progress: Progress) -> None:
            work.spend(before + images * progress.done - work.forwards)

        calibrator = GreedyCalibrator(
            batched.captured,
            batched.sites,
            batched.layout,
            threshold,
            work.session.steps,
            report,
            known,
            keep,
        )
        batched.run(calibrator, self.batch)

    def _run_per_step(
        self, batched: Session, budget: float, known: Sequence[Row], keep: Callable[[Row], None]
    ) -> None:
        calibrator = PerStepCalibrator(batched, self.costs, budget, known, keep)
        batched.run(calibrator, self.batch)
        self.work.spend(2.0 * self.work.session.steps * self._images)
