"""The pipeline of the embedded digits DiT: class labels in, 64x64 pixels out, no download.

A guided step is one transformer call, with the conditional half of the batch first as in diffusers'
``DiTPipeline``.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.tools.pipeline_arguments import (
    Generators,
    OutputType,
    as_output,
    check_generator,
    check_guidance,
    check_output_type,
    check_steps,
    is_integer,
    load_saved,
)

EMBEDDED_FOLDER = Path(__file__).parent / "assets" / "digits-dit-64"
TRAIN_COMMAND = (
    "python -m ditfastattn.tools.train_digits --work /tmp/digits --out tools/assets/digits-dit-64"
)


class DigitsPipeline(DiffusionPipeline):
    """Draw digits with a class-conditional DiT that works on pixels in [-1, 1].

    The null class of guidance is ``transformer.config.num_embeds_ada_norm``.
    """

    model_cpu_offload_seq = "transformer"  # type: ignore[assignment]  # the base says None
    transformer: DiTTransformer2DModel
    scheduler: Any  # diffusers' schedulers have no common typed base class

    def __init__(
        self, transformer: DiTTransformer2DModel, scheduler: KarrasDiffusionSchedulers
    ) -> None:
        """Register the two modules."""
        super().__init__()
        self.register_modules(  # type: ignore[no-untyped-call]  # diffusers has no annotation
            transformer=transformer, scheduler=scheduler
        )
        self._guidance_scale = 1.0

    @property
    def guidance_scale(self) -> float:
        """Return the scale of the last generation."""
        return self._guidance_scale

    @torch.no_grad()
    def __call__(
        self,
        class_labels: list[int],
        guidance_scale: float = 2.0,
        num_inference_steps: int = 20,
        generator: Generators = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Return one image per label.

        With ``guidance_scale`` 1.0 the transformer runs on the conditional half alone.
        ``output_type`` "pt" gives ``[B, 1, H, W]`` in [0, 1] in the transformer's dtype, "np"
        ``[B, H, W, 1]`` fp32, "pil" a list of greyscale images.

        Raises:
            ConfigError: an argument does not suit the model or the scheduler.
        """
        config: Any = self.transformer.config  # diffusers declares a plain dict
        _check_labels(class_labels, config.num_embeds_ada_norm)
        check_guidance(guidance_scale)
        check_steps(num_inference_steps, self.scheduler.config.num_train_timesteps)
        check_generator(generator, len(class_labels))
        check_output_type(output_type)
        self._guidance_scale = guidance_scale
        latents = self._sample(class_labels, guidance_scale, num_inference_steps, generator)
        images = as_output((latents / 2.0 + 0.5).clamp(0.0, 1.0), output_type)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]  # as above
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _sample(
        self, class_labels: Sequence[int], guidance_scale: float, steps: int, generator: Generators
    ) -> Tensor:
        config: Any = self.transformer.config
        device = self._execution_device
        batch, guided = len(class_labels), guidance_scale != 1.0
        labels = torch.tensor(class_labels, device=device)
        if guided:
            labels = torch.cat([labels, torch.full_like(labels, config.num_embeds_ada_norm)])
        self.scheduler.set_timesteps(steps, device=device)
        shape = (batch, config.in_channels, config.sample_size, config.sample_size)
        latents: Tensor = randn_tensor(
            shape, generator, device=device, dtype=self.transformer.dtype
        )
        latents = latents * self.scheduler.init_noise_sigma
        # For reproducible results, a stochastic scheduler must use the caller's generator.
        takes_generator = "generator" in inspect.signature(self.scheduler.step).parameters
        extra = {"generator": generator} if takes_generator else {}
        progress: Any = self.progress_bar  # a method that diffusers does not annotate
        for timestep in progress(self.scheduler.timesteps):
            doubled = torch.cat([latents, latents]) if guided else latents
            noisy = self.scheduler.scale_model_input(doubled, timestep)
            noise = self.transformer(
                noisy, timestep=timestep.expand(len(noisy)), class_labels=labels
            ).sample
            if guided:
                conditional, unconditional = noise.chunk(2)
                noise = unconditional + guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(noise, timestep, latents, **extra).prev_sample
        return latents


def _check_labels(class_labels: Sequence[int], classes: int) -> None:
    expected = f"a list of integers from 0 to {classes - 1}"
    if not isinstance(class_labels, list) or not class_labels:
        raise ConfigError(
            "the class labels are not a list with at least one label",
            where="class_labels",
            got=repr(class_labels),
            expected=expected,
            remedy="pass one label per image, such as [3, 7]",
        )
    for index, label in enumerate(class_labels):
        if not is_integer(label) or not 0 <= label < classes:
            raise ConfigError(
                "the model has no such class",
                where=f"class_labels[{index}]",
                got=repr(label),
                expected=expected,
                remedy="pass the digits to draw; the pipeline adds the null class",
            )


def load_pipeline(folder: Path) -> DigitsPipeline:
    """Load the pipeline saved in ``folder`` with its weights widened to fp32.

    Raises:
        ConfigError: ``folder`` holds no pipeline.
    """
    remedy = f"reinstall the package, or train the model: {TRAIN_COMMAND}"
    return load_saved(DigitsPipeline, folder, "digits", remedy)


def embedded_pipeline() -> DigitsPipeline:
    """Load the model that comes with the package; raises what ``load_pipeline`` raises."""
    return load_pipeline(EMBEDDED_FOLDER)
