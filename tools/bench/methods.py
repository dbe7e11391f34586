"""What the benchmark compares: methods, each with the settings of its sweep."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.contender import Contender, dense_contender
from ditfastattn.tools.bench.forms import Form
from ditfastattn.tools.bench.setup import Data, Setup

EAGER = "dense-eager"
FEWER = "fewer-steps"


@dataclass(frozen=True)
class Entry:
    """One setting of a method.

    Attributes:
        setting: its name.
        contender: makes it, in a form; ``Form.EAGER`` compiles nothing.
        details: what else to record.
        more: what to record once it has run.
        dense: whether it is the dense model, whose images the others' are compared with.
    """

    setting: str
    contender: Callable[[Form], Contender]
    details: Mapping[str, Any] = field(default_factory=dict)
    more: Callable[[], Mapping[str, Any]] = dict
    dense: bool = False


class Method(Protocol):
    """A way to make generations faster."""

    @property
    def name(self) -> str:
        """Return the name in options and records."""
        ...

    def entries(self, setup: Setup) -> Sequence[Entry]:
        """Return the settings; whatever this needs is measured, or read from the checkpoint."""
        ...

    def form(self, setup: Setup, entries: Sequence[Entry]) -> tuple[Form, Data]:
        """Return the form to time, and what was measured to choose it."""
        ...


def whole_model(setup: Setup) -> Form:
    """Return the form of what is compiled whole."""
    return Form.MODEL if setup.options.compiled else Form.EAGER


def lowering_of(form: Form) -> Lowering:
    """Return how a model in ``form`` is compiled."""
    return Lowering.EAGER if form is Form.EAGER else Lowering.INDUCTOR


@dataclass(frozen=True)
class EagerDense:
    """The dense model, not compiled."""

    name: str = EAGER

    def entries(self, setup: Setup) -> Sequence[Entry]:
        """Return the one setting."""

        def contender(form: Form) -> Contender:
            return dense_contender(setup.pipeline, setup.prompts, lowering_of(form))

        return [Entry("", contender, dense=True)]

    def form(self, setup: Setup, entries: Sequence[Entry]) -> tuple[Form, Data]:
        """Return the form."""
        return Form.EAGER, {}


@dataclass(frozen=True)
class FewerSteps:
    """The same solver with fewer steps, from the same noise."""

    name: str = FEWER

    def entries(self, setup: Setup) -> Sequence[Entry]:
        """Return a setting per number of steps."""
        return [_fewer(setup, count) for count in setup.options.counts(setup.options.fewer)]

    def form(self, setup: Setup, entries: Sequence[Entry]) -> tuple[Form, Data]:
        """Return the form."""
        return whole_model(setup), {}


def _fewer(setup: Setup, count: int) -> Entry:
    prompts = [_with_steps(prompt, count) for prompt in setup.prompts]

    def contender(form: Form) -> Contender:
        return dense_contender(setup.pipeline, prompts, lowering_of(form))

    return Entry(f"{count} steps", contender, {"steps": count})


def _with_steps(prompt: Prompt, count: int) -> Prompt:
    return replace(prompt, call={**prompt.call, "num_inference_steps": count})
