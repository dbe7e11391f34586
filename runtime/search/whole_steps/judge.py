"""How good the images of a plan of whole steps are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from ditfastattn.runtime.opaque import OpaqueModel
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.runtime.pipeline.forwards import Forward, replace_forward
from ditfastattn.runtime.pipeline.model_call import with_output
from ditfastattn.runtime.pipeline.prompts import Prompt, as_images, generate
from ditfastattn.runtime.search.judge.judgement import Judgement, judge_images
from ditfastattn.runtime.search.record.checkpoint import Checkpoint
from ditfastattn.runtime.search.whole_steps.candidates import FittedMask
from ditfastattn.runtime.search.whole_steps.observed import Observed
from ditfastattn.runtime.search.whole_steps.record import Recorder
from ditfastattn.runtime.search.whole_steps.rollout import State


class Judge:
    """Compare images of plans with the dense ones, by the target's metric."""

    def __init__(self, pipeline: Any, recorder: Recorder, checkpoint: Checkpoint) -> None:
        """Take the pipeline, and what a plan is made by."""
        self._pipeline, self._recorder, self._checkpoint = pipeline, recorder, checkpoint
        self._request, self._meter = recorder.request, recorder.meter
        self._module = transformer_of(pipeline, "calibrate(pipeline)")
        self._dense_images: dict[int, Tensor] = {}  # of held-out prompts

    def replayed(
        self,
        mask: FittedMask,
        prompts: Sequence[Prompt],
        observed: Sequence[Observed],
        states: Sequence[State],
    ) -> list[Judgement]:
        """Judge ``prompts`` by ``mask`` without running the model: in ``states`` it has run."""
        model = self._model(mask, observed[0])
        judged: list[Judgement] = []
        for prompt, dense, state in zip(prompts, observed, states, strict=True):
            returned = partial(_replay, dense.steps[0].calls[0].form, iter(state.returned))
            made = self._images(prompt, partial(_in_place_of, model, returned))
            judged += judge_images(self._request.target, dense.images, made, prompt.call)
        return judged

    def held_out(
        self, mask: FittedMask, observed: Observed, running: Callable[[], Forward] | None = None
    ) -> list[Judgement]:
        """Judge the held-out prompts by ``mask``, up to the first that misses the target.

        ``running`` returns, for each generation, what runs at the steps that run; it is the model
        as it is where None.
        """
        model = self._model(mask, observed)
        judged: list[Judgement] = []
        for index, prompt in enumerate(self._request.held_out):
            dense = self._dense(index, prompt, len(observed.steps))
            make = model.around if running is None else partial(_in_place_of, model, running())
            planned = self._images(prompt, make)
            self._meter.spend(len(mask.runs))
            judged += judge_images(self._request.target, dense, planned, prompt.call)
            if not self.meets(judged):
                break
        return judged

    def generate_held_out(self, steps: int) -> None:
        """Generate the held-out prompts densely, in ``steps``: later the model may be held."""
        for index, prompt in enumerate(self._request.held_out):
            self._dense(index, prompt, steps)

    def meets(self, judged: Sequence[Judgement]) -> bool:
        """Return whether all meet the target."""
        return all(self._request.target.met_by(item.value) for item in judged)

    def _model(self, mask: FittedMask, observed: Observed) -> OpaqueModel:
        """Return the model that runs by ``mask``."""
        plan = self._recorder.subject.opaque(self._recorder.plan(mask, observed))
        return OpaqueModel(self._module, plan, self._request.timestep)

    def _images(self, prompt: Prompt, make: Callable[[Forward], Forward]) -> Tensor:
        """Return the images of ``prompt`` with the model's forward replaced by ``make`` of it."""
        undo = replace_forward(self._module, make)
        try:
            return as_images(generate(self._pipeline, prompt))
        finally:
            undo()

    def _dense(self, index: int, prompt: Prompt, steps: int) -> Tensor:
        def make() -> dict[str, Tensor]:
            images = as_images(generate(self._pipeline, prompt))
            self._meter.spend(steps)
            return {"images": images}

        if index not in self._dense_images:
            kept = self._checkpoint.tensors(f"dense-held-out-{index}", make)
            self._dense_images[index] = kept["images"]
        return self._dense_images[index]


def _replay(form: Any, returned: Any, *_args: Any, **_kwargs: Any) -> Any:
    return with_output(form, next(returned))


def _in_place_of(model: OpaqueModel, forward: Forward, _own: Forward) -> Forward:
    return model.around(forward)
