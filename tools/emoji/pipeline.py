"""The pipeline of the emoji model: captions in, 64x64 pictures out, no download.

As in diffusers' PixArt pipelines a guided step is one transformer call, with the unconditional half
of the batch first. The model works on pixels, so there is no autoencoder.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.tools.emoji.captions import Caption, Vocabulary
from ditfastattn.tools.emoji.text_encoder import WordTable
from ditfastattn.tools.pipeline_arguments import (
    Generators,
    OutputType,
    as_output,
    check_generator,
    check_guidance,
    check_output_type,
    check_steps,
    load_saved,
)

EMBEDDED_FOLDER = Path(__file__).parents[1] / "assets" / "emoji-dit-64"
_PACKAGE_FILE = "lobehub-fluent-emoji-3d-1.1.0.tgz"
TRAIN_COMMAND = (
    f"python -m ditfastattn.tools.emoji.train --package {_PACKAGE_FILE} --work /tmp/emoji"
)
PUBLISH_COMMAND = "python -m ditfastattn.tools.emoji.publish --work /tmp/emoji --out emoji-dit-64"
EVALUATE_COMMAND = (
    f"python -m ditfastattn.tools.emoji.evaluate --package {_PACKAGE_FILE} --model emoji-dit-64"
)


class EmojiPipeline(DiffusionPipeline):
    """Draw emoji with a DiT that reads captions such as "a panda on blue, facing right".

    The words that it knows are in ``vocabulary``.
    """

    model_cpu_offload_seq = "text_encoder->transformer"  # type: ignore[assignment]  # base: None
    transformer: PixArtTransformer2DModel
    text_encoder: WordTable
    scheduler: Any  # diffusers' schedulers have no common typed base class

    def __init__(
        self,
        transformer: PixArtTransformer2DModel,
        text_encoder: WordTable,
        scheduler: FlowMatchEulerDiscreteScheduler,
    ) -> None:
        """Register the three components."""
        super().__init__()
        self.register_modules(  # type: ignore[no-untyped-call]  # diffusers has no annotation
            transformer=transformer, text_encoder=text_encoder, scheduler=scheduler
        )
        self._guidance_scale = 1.0

    @property
    def vocabulary(self) -> Vocabulary:
        """Return the words of captions."""
        return self.text_encoder.vocabulary

    @property
    def guidance_scale(self) -> float:
        """Return the scale of the last generation."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Return whether the last generation was guided."""
        return self._guidance_scale != 1.0

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str],
        num_inference_steps: int = 20,
        guidance_scale: float = 2.5,
        num_images_per_prompt: int = 1,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: OutputType = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any, ...]:
        """Return the pictures of one caption or several.

        With ``guidance_scale`` 1.0 the transformer runs on the conditional half alone.
        ``latents`` is the noise to start from, ``[B, 3, H, W]``. ``output_type`` "pt" gives
        ``[B, 3, H, W]`` in [0, 1] in the transformer's dtype, "np" ``[B, H, W, 3]`` fp32, "pil" a
        list of pictures.

        Raises:
            ConfigError: a prompt is not a caption, or an argument does not suit the model.
        """
        captions = self._captions(prompt, num_images_per_prompt)
        check_guidance(guidance_scale)
        check_steps(num_inference_steps, self.scheduler.config.num_train_timesteps)
        check_generator(generator, len(captions))
        check_output_type(output_type)
        self._guidance_scale = guidance_scale
        noise = self._noise(len(captions), generator, latents)
        pixels = self._sample(self.encode_prompt(captions), noise, num_inference_steps)
        images = as_output((pixels / 2.0 + 0.5).clamp(0.0, 1.0), output_type)
        self.maybe_free_model_hooks()  # type: ignore[no-untyped-call]  # as above
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def encode_prompt(self, captions: list[Caption]) -> Tensor:
        """Return the embedded words ``[B, 3, C]``, those of the null caption first if guided."""
        tokens = self.text_encoder.tokenize(captions)
        if self.do_classifier_free_guidance:
            tokens = torch.cat([torch.full_like(tokens, self.vocabulary.null), tokens])
        embedded: Tensor = self.text_encoder(tokens.to(self._execution_device))
        return embedded.to(self.transformer.dtype)

    def _captions(self, prompt: object, repeat: int) -> list[Caption]:
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not isinstance(texts, list) or not texts:
            raise ConfigError(
                "the prompt is neither a caption nor a list with at least one",
                where="prompt",
                got=repr(prompt),
                expected="a string, or a list of strings",
                remedy=f"pass a caption, such as '{self.vocabulary.captions()[0]}'",
            )
        where = (
            ["prompt"] if isinstance(prompt, str) else [f"prompt[{i}]" for i in range(len(texts))]
        )
        captions = [self.vocabulary.parse(*both) for both in zip(texts, where, strict=True)]
        return [caption for caption in captions for _ in range(repeat)]

    def _noise(self, images: int, generator: Generators, latents: Tensor | None) -> Tensor:
        config: Any = self.transformer.config
        shape = (images, config.in_channels, config.sample_size, config.sample_size)
        device, dtype = self._execution_device, self.transformer.dtype
        if latents is None:
            noise: Tensor = randn_tensor(shape, generator, device=device, dtype=dtype)
            return noise
        if latents.shape != shape:
            raise ConfigError(
                "the latents do not match the prompts",
                where="latents",
                got=list(latents.shape),
                expected=list(shape),
                remedy="pass one noise tensor per picture, or none",
            )
        return latents.to(device, dtype)

    def _sample(self, conditions: Tensor, latents: Tensor, steps: int) -> Tensor:
        self.scheduler.set_timesteps(steps, device=latents.device)
        guided = self.do_classifier_free_guidance
        progress: Any = self.progress_bar  # a method that diffusers does not annotate
        for timestep in progress(self.scheduler.timesteps):
            noisy = torch.cat([latents, latents]) if guided else latents
            velocity = self.transformer(
                noisy,
                encoder_hidden_states=conditions,
                timestep=timestep.expand(len(noisy)),
                added_cond_kwargs={"resolution": None, "aspect_ratio": None},
            ).sample
            if guided:
                unconditional, conditional = velocity.chunk(2)
                velocity = unconditional + self._guidance_scale * (conditional - unconditional)
            latents = self.scheduler.step(velocity, timestep, latents).prev_sample
        return latents


def load_pipeline(folder: Path) -> EmojiPipeline:
    """Load the pipeline saved in ``folder`` with its weights widened to fp32.

    Raises:
        ConfigError: ``folder`` holds no pipeline.
    """
    remedy = f"train the model ({TRAIN_COMMAND}), then write it ({PUBLISH_COMMAND})"
    return load_saved(EmojiPipeline, folder, "emoji", remedy)


def embedded_pipeline() -> EmojiPipeline:
    """Load the model that comes with the package; raises what ``load_pipeline`` raises."""
    return load_pipeline(EMBEDDED_FOLDER)
