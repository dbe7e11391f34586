"""Compile in other processes what this one is about to run: they share Inductor's cache on disk.

Most of a compilation is Python and the C++ compiler, one after the other, on one core. A helper
takes the models in the opposite order, so that both meet in the middle; what it has compiled is
read from the cache here.
"""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from ditfastattn.passes.plan.schema import Plan
from ditfastattn.runtime.lowering import Lowering, many_compilations
from ditfastattn.runtime.pipeline.prompts import Prompt
from ditfastattn.runtime.search.measure.contender import dense_contender, planned_contender
from ditfastattn.tools.embedded import ModelName, embedded_model

log = logging.getLogger(__name__)

DENSE = "dense"
_MODULE = "ditfastattn.tools.demo.compile_ahead"


@contextmanager
def compiling_ahead(model: ModelName, forms: Sequence[str]) -> Generator[None]:
    """Compile forms of ``model`` in helper processes for as long as the context is open.

    Each of ``forms`` is ``DENSE`` or the path of a plan, in the order in which this process comes
    to them. Without a second core there is no helper.
    """
    others = forms[::-1]
    count = min((os.cpu_count() or 1) - 1, len(others) - 1)
    helpers = [_start([model, *others[first::count]]) for first in range(count)]
    try:
        yield
    finally:
        for helper in helpers:
            _end(helper)


def _start(arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-m", _MODULE, *arguments],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},  # code depends on it
        start_new_session=True,  # an interrupt is for the demo, which then ends its helpers
    )


def _end(helper: subprocess.Popen[bytes]) -> None:
    """End a helper with its compilers: Inductor writes its cache file by file, atomically."""
    code = helper.poll()
    if code:
        log.warning("ditfastattn: a helper failed (%d): everything was compiled here", code)
    with suppress(ProcessLookupError):
        os.killpg(helper.pid, signal.SIGKILL)
    helper.wait()


def compile_all(model: ModelName, forms: Sequence[str]) -> None:
    """Compile an embedded model dense, or by plans, by one generation each."""
    embedded = embedded_model(model)
    pipeline = embedded.open()
    for name in forms:
        plan = None if name == DENSE else Plan.load(Path(name))
        prompts = [Prompt({**embedded.call, **embedded.conditions(1)[0]}, 0)]
        if plan is None:
            contender = dense_contender(pipeline, prompts, Lowering.INDUCTOR)
        else:
            steps, scale = plan.sampler.steps, plan.sampler.guidance_scale
            call = {**prompts[0].call, "num_inference_steps": steps, "guidance_scale": scale}
            contender = planned_contender(pipeline, plan, [Prompt(call, 0)], Lowering.INDUCTOR)
        with many_compilations():
            contender.generate(0)


if __name__ == "__main__":
    compile_all(ModelName(sys.argv[1]), sys.argv[2:])
