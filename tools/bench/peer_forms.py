"""A peer as a method of the benchmark: calibrated, and timed in the form in which it is fastest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch._dynamo.utils import counters

from ditfastattn.runtime.search.judge.metrics import image_psnr
from ditfastattn.runtime.search.measure.contender import Contender
from ditfastattn.runtime.search.measure.timing import measure_turns
from ditfastattn.tools.bench.fidelity import MOST_PSNR
from ditfastattn.tools.bench.forms import Form, PeerContender, forms_of, fresh_copy, peer_contender
from ditfastattn.tools.bench.methods import Entry
from ditfastattn.tools.bench.peers.base import Peer, Scope, Setting, Subject
from ditfastattn.tools.bench.setup import Data, Setup, reason_of

SAME_PSNR = 30.0  # dB to the eager form; a compiled form below it computes something else
EQUALLY_FAST = 1.02
_REPETITIONS = 3


def compilations() -> int:
    """Return how many frames Dynamo has compiled, or tried to compile, in this process."""
    return int(counters["frames"]["total"])


def calibrated(setup: Setup, peer: Peer) -> Any:
    """Return what the peer's own calibration measures; None if it has none."""
    if peer.calibrate is None:
        return None
    transformer = fresh_copy(setup.pipeline.transformer)
    subject = Subject(transformer, setup.options.steps, setup.model.guided)
    prompts = setup.model.calibration_prompts(setup.options.steps)[:1]

    def generate(scope: Scope) -> None:
        PeerContender(setup.pipeline, transformer, prompts, scope).generate(0)

    setup.tell(f"calibrating {peer.name}")
    return peer.calibrate(subject, generate)


@dataclass(frozen=True)
class PeerMethod:
    """A caching library's method."""

    peer: Peer

    @property
    def name(self) -> str:
        """Return the peer's name."""
        return self.peer.name

    def entries(self, setup: Setup) -> Sequence[Entry]:
        """Return the sweep."""
        calibration = setup.checkpoint.data(
            f"calibration-{self.name}", lambda: {"found": calibrated(setup, self.peer)}
        )["found"]
        return [
            Entry(
                setting.label,
                partial(_contender, setup, self.peer, setting, calibration),
                dict(setting.options),
            )
            for setting in self.peer.settings
        ]

    def form(self, setup: Setup, entries: Sequence[Entry]) -> tuple[Form, Data]:
        """Return the form in which the middle of the sweep is fastest."""
        return best_form(setup, self.peer, entries[len(entries) // 2])


def _contender(
    setup: Setup, peer: Peer, setting: Setting, calibration: Any, form: Form
) -> PeerContender:
    """Return ``peer`` at ``setting``, in ``form``."""
    return peer_contender(
        setup.model,
        setup.pipeline,
        setup.prompts,
        setup.options.steps,
        peer,
        setting,
        form,
        calibration,
    )


def best_form(setup: Setup, peer: Peer, entry: Entry) -> tuple[Form, Data]:
    """Return the form in which ``peer`` is fastest at the setting ``entry``, and all forms.

    Each form is timed in turns with the eager one. It counts if its image is the eager form's, up
    to the error of compilation. Among equally fast forms, the one that compiles fastest wins.
    """
    found: dict[Form, Data] = {}
    eager: Contender | None = None
    for form in forms_of(peer) if setup.options.compiled else (Form.EAGER,):
        setup.tell(f"{peer.name}: trying the form {form}")
        torch._dynamo.reset()  # forms share nothing that was compiled, or that failed to
        try:
            contender = entry.contender(form)
            seconds = contender.warm_up()
            eager = eager or contender
            found[form] = {"compile_seconds": seconds, **_against(eager, contender)}
        except Exception as error:  # another library's code: anything may be raised
            found[form] = {"failed": reason_of(error)}
    torch._dynamo.reset()
    sound = [form for form in found if found[form].get("psnr_to_eager", 0.0) >= SAME_PSNR]
    kept: Data = {str(form): measured for form, measured in found.items()}
    if Form.EAGER not in sound:  # then no setting will run, and each records its reason
        return Form.EAGER, kept
    best = max(found[form]["speedup_over_eager"] for form in sound)
    tied = [f for f in sound if EQUALLY_FAST * found[f]["speedup_over_eager"] >= best]
    return min(tied, key=lambda form: found[form]["compile_seconds"]), kept


def _against(eager: Contender, contender: Contender) -> Data:
    """Return how a form compares with the eager one."""
    psnr = min(float(image_psnr(eager.images[0], contender.images[0]).mean()), MOST_PSNR)
    if contender is eager:
        return {"psnr_to_eager": psnr, "speedup_over_eager": 1.0}
    (timing,) = measure_turns(eager.generate, [contender.generate], _REPETITIONS, compilations)
    return {"psnr_to_eager": psnr, "speedup_over_eager": timing.speedup.median}
