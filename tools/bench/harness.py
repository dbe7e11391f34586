"""Measure contenders: how close their images are to the dense model's, and how fast they are.

Images are compared first, of every contender, nothing compiled: that is independent of the
machine's load. Then each method's settings are compiled, and take turns with the compiled dense
model. A checkpoint keeps what is finished.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.search.measure.contender import Contender, dense_contender
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.tools.bench.fidelity import fidelity
from ditfastattn.tools.bench.forms import Form
from ditfastattn.tools.bench.methods import EagerDense, Entry, FewerSteps, Method
from ditfastattn.tools.bench.peer_forms import PeerMethod, compilations
from ditfastattn.tools.bench.plans import our_methods
from ditfastattn.tools.bench.rules import OTHERS
from ditfastattn.tools.bench.setup import Data, Group, Setup, failure

_DENSE_COMPILE = "dense-compile-seconds"


def methods_of(setup: Setup) -> list[Method]:
    """Return what is compared: dense, ours, fewer steps, others' rules, and the peers."""
    options = setup.options
    others = OTHERS if options.counts(options.rules) else ()
    peers = map(PeerMethod, options.peers)
    return [EagerDense(), *our_methods(options), FewerSteps(), *others, *peers]


class Bench:
    """Measure all contenders of a model."""

    def __init__(self, setup: Setup) -> None:
        """Take what the contenders share."""
        self.setup = setup
        self.dense_compile_seconds = float(setup.checkpoint.peek(_DENSE_COMPILE) or 0.0)
        self._dense: Contender | None = None

    def run(self) -> list[Group]:
        """Return one group per method."""
        methods = methods_of(self.setup)
        compared = [self._compared(method) for method in methods]
        return [self._timed(*pair) for pair in zip(methods, compared, strict=True)]

    def _compared(self, method: Method) -> Data:
        """Return the fidelity of each setting, by name, and the failures."""
        lanes: dict[str, Data] = {}
        failures: list[Data] = []
        try:
            entries = method.entries(self.setup)
        except Exception as error:  # another library's code: anything may be raised
            return {"lanes": {}, "failures": [failure(method.name, "", error)]}
        torch._dynamo.reset()  # methods share neither compilations nor Dynamo's limit on them
        for number, entry in enumerate(entries):
            self.setup.tell(f"{method.name}: images {entry.setting}")
            try:
                with many_compilations():
                    lanes[entry.setting] = self.setup.checkpoint.data(
                        f"images-{method.name}-{number}", partial(self._images, entry)
                    )
            except Exception as error:
                failures.append(failure(method.name, entry.setting, error))
        return {"lanes": lanes, "failures": failures}

    def _images(self, entry: Entry) -> Data:
        reference = self._reference()
        images = reference if entry.dense else torch.cat(entry.contender(Form.EAGER).by_prompt())
        return {"fidelity": asdict(fidelity(reference, images)), "details": entry.more()}

    def _reference(self) -> Tensor:
        """Return the dense images of all prompts."""
        setup = self.setup

        def make() -> dict[str, Tensor]:
            setup.tell("dense images")
            dense = dense_contender(setup.pipeline, setup.prompts, Lowering.EAGER)
            return {"images": torch.cat(dense.by_prompt())}

        return setup.checkpoint.tensors("dense-images", make)["images"]

    def _timed(self, method: Method, compared: Data) -> Group:
        def timed() -> Data:
            began = time.monotonic()
            torch._dynamo.reset()
            self._dense = None
            entries = method.entries(self.setup) if compared["lanes"] else []
            sound = [entry for entry in entries if entry.setting in compared["lanes"]]
            with many_compilations():
                form, forms = method.form(self.setup, sound) if sound else (Form.EAGER, {})
                made = self._measure(method, form, sound, compared["lanes"])
            made["failures"] = compared["failures"] + made["failures"]
            return {**made, "forms": forms, "seconds": time.monotonic() - began}

        found: Data = self.setup.checkpoint.data(f"group-{method.name}", timed)
        return {"method": method.name, **found}

    def _measure(
        self, method: Method, form: Form, entries: Sequence[Entry], compared: Mapping[str, Data]
    ) -> Data:
        """Time ``entries`` in turns with the dense model."""
        warm: list[tuple[Entry, Contender, float]] = []
        failures: list[Data] = []
        dense, tell = self._dense_contender(), self.setup.tell
        for entry in entries:
            tell(f"{method.name}: warming up {entry.setting or form}")
            try:
                contender = entry.contender(form)
                warm.append((entry, contender, contender.warm_up()))
            except Exception as error:  # another library's code
                failures.append(failure(method.name, entry.setting, error))
        if not warm:
            return {"lanes": [], "failures": failures}
        tell(f"{method.name}: timing {len(warm)} contenders and dense, in turns")
        calls = [contender.generate for _, contender, _ in warm]
        repetitions = self.setup.options.repetitions
        timings = measure_turns(dense.generate, calls, repetitions, compilations)
        reference = dense.stacked()
        lanes: list[dict[str, Any]] = []
        for (entry, contender, seconds), timing in zip(warm, timings, strict=True):
            found = compared[entry.setting]
            lanes.append(
                {
                    "method": method.name,
                    "setting": entry.setting,
                    "form": form,
                    "details": {**entry.details, **found["details"]},
                    **found["fidelity"],
                    # of the timed generations: what was compiled computes what was compared
                    "timed_psnr": fidelity(reference, contender.stacked()).psnr,
                    "speedup": asdict(timing.speedup),
                    "seconds": asdict(timing.candidate),
                    "dense_seconds": asdict(timing.baseline),
                    "compile_seconds": seconds,
                }
            )
        return {"lanes": lanes, "failures": failures}

    def _dense_contender(self) -> Contender:
        if self._dense is None:
            setup = self.setup
            self._dense = dense_contender(setup.pipeline, setup.prompts, setup.options.lowering)
            setup.tell("warming up the dense model")
            self.dense_compile_seconds = self._dense.warm_up()
            setup.checkpoint.put(_DENSE_COMPILE, self.dense_compile_seconds)
        return self._dense
