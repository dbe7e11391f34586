"""Run a ``torch.export`` program by a plan, without Dynamo."""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

from ditfastattn.passes.analysis.sites import SiteReport
from ditfastattn.passes.capture.dynamo import refuse_autocast
from ditfastattn.passes.capture.exported import capture_exported, flat_tensors
from ditfastattn.passes.graph.ir import value
from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.matching import check_shapes
from ditfastattn.runtime.options import parse_options
from ditfastattn.runtime.specializations import specialization_of


class PlannedProgram:
    """Run an exported transformer by a plan, one call after another; call it as the module itself.

    A plan made by ``calibrate`` serves, where the export's example inputs were given by keyword::

        program = torch.export.export(model, (), call)
        planned = PlannedProgram(program, "plan.json")
        output = planned(**call)
    """

    def __init__(
        self,
        program: ExportedProgram,
        plan: Plan | str | os.PathLike[str],
        *,
        mode: str | None = None,
        **options: Any,
    ) -> None:
        """Capture ``program``; ``mode`` and ``options`` are as ``accelerate`` takes them.

        Raises:
            ConfigError: the program cannot be captured, the plan not be read, or an option is
                unknown. Whether the plan is for this model shows at the first call.
        """
        chosen = parse_options({**options, "plan": plan}, mode)
        self._program = program
        self._specialization = specialization_of(capture_exported(program), chosen)

    @property
    def sites(self) -> SiteReport:
        """Return the sites of the program, and the attention that is none, with the reasons."""
        return self._specialization.report

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run one step.

        Raises:
            ConfigError: the plan is for another model or sampler; the arguments are not of the
                structure, shapes and dtypes of the export.
        """
        tensors = flat_tensors(self._program, args, kwargs)
        self._check_shapes(tensors)
        refuse_autocast(tensors)
        results = self._specialization.step(tensors)
        structure: Any = self._program.call_spec.out_spec
        return pytree.tree_unflatten(list(results), structure)

    def _check_shapes(self, tensors: list[Tensor]) -> None:
        captured = self._specialization.captured
        placeholders = captured.module.graph.find_nodes(op="placeholder")
        check_shapes(
            captured,
            [value(node) for node in placeholders],
            tensors,
            "the program was exported at another shape",
            "export it at the shapes it is called with",
        )
