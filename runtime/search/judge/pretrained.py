"""Metrics of pretrained networks; their weights must be installed: nothing is downloaded here."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.search.judge.metrics import QualityMetric, as_rgb, require_side

DEFAULT_CLIP_MODEL = "openai/clip-vit-base-patch16"

_ALEXNET_LEAST_SIDE = 31  # below, AlexNet's second pooling has nothing left to pool
_OTHERWISE = "or use --min-ssim, which needs no network"


@dataclass(frozen=True, kw_only=True)
class Lpips(QualityMetric):
    """Compare AlexNet's features (LPIPS): 0 is equal."""

    name: str = "lpips"
    label: str = "LPIPS"
    perfect: float | None = 0.0

    def prepare(self, call: Mapping[str, Any]) -> None:
        """Load AlexNet.

        Raises:
            ConfigError: torchvision or the weights are missing.
        """
        _lpips_network()

    def measure(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return the distance, ``[B]``."""
        require_side(dense, _ALEXNET_LEAST_SIDE, self.label)
        network = _lpips_network().to(dense.device)
        pairs = zip(as_rgb(planned, self.label), as_rgb(dense, self.label), strict=True)
        distances = [network(one[None], other[None]) for one, other in pairs]
        network.reset()  # or it would keep every distance for a mean
        return torch.stack(distances)


@functools.cache
def _lpips_network() -> Any:
    models: Any = import_optional("torchvision", "LPIPS").models
    file = models.AlexNet_Weights.DEFAULT.url.rpartition("/")[2]
    weights = Path(torch.hub.get_dir(), "checkpoints", file)
    if not weights.is_file():
        fetch = "from torchvision.models import alexnet; alexnet(weights='DEFAULT')"
        raise ConfigError(
            "the weights of AlexNet, which LPIPS needs, are missing",
            where=str(weights),
            got="no such file",
            expected="the weights that torchvision keeps there",
            remedy=f'fetch them once: python -c "{fetch}"; {_OTHERWISE}',
        )
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    return LearnedPerceptualImagePatchSimilarity(net_type="alex", normalize=True)


@dataclass(frozen=True, kw_only=True)
class ClipScore(QualityMetric):
    """Compare the planned image with its prompt: 100 times the cosine of their CLIP embeddings.

    A prompt longer than CLIP can read is cut, as is usual for this score.

    Attributes:
        model: a model that is in Hugging Face's cache, or the folder of one.
    """

    name: str = "clip-score"
    label: str = "CLIP score"
    model: str = DEFAULT_CLIP_MODEL

    def prepare(self, call: Mapping[str, Any]) -> None:
        """Load the model and look for the prompt.

        Raises:
            ConfigError: transformers, the model or the prompt is missing.
        """
        _prompts(call)
        _clip(self.model)

    def measure(self, dense: Tensor, planned: Tensor, call: Mapping[str, Any]) -> Tensor:
        """Return the score of the planned images, ``[B]``."""
        texts = _prompt_of_each(_prompts(call), len(planned))
        model, processor = _clip(self.model)
        pictures = (as_rgb(planned, self.label) * 255.0).round().to(torch.uint8).cpu()
        inputs = processor(
            text=texts,
            images=list(pictures),
            return_tensors="pt",
            padding=True,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
        )
        found = model.to(planned.device)(**inputs.to(planned.device))
        cosine: Tensor = (found.image_embeds * found.text_embeds).sum(-1)  # both have length 1
        return 100.0 * cosine.clamp(min=0.0)


@functools.cache
def _clip(name: str) -> tuple[Any, Any]:
    """Return model and processor; torchmetrics' own score fails with transformers 5."""
    transformers = import_optional("transformers", "the CLIP score")
    try:
        model, loading = transformers.CLIPModel.from_pretrained(
            name, local_files_only=True, output_loading_info=True
        )
        processor = transformers.CLIPProcessor.from_pretrained(name, local_files_only=True)
        if loading["missing_keys"]:  # they were drawn at random
            raise ValueError(f"no weights for {', '.join(sorted(loading['missing_keys'])[:3])}")
    except (ImportError, OSError, ValueError) as error:
        cache = importlib.import_module("huggingface_hub.constants").HF_HUB_CACHE
        folder = Path(name).is_dir()
        fetch = "save both there" if folder else f"fetch it once (hf download {name})"
        raise ConfigError(
            f"the CLIP model {name!r} is not available locally",
            where=name if folder else cache,
            got=str(error).strip().partition("\n")[0],
            expected="a CLIPModel and its CLIPProcessor",
            remedy=f"{fetch}, name another folder by clip_model, {_OTHERWISE}",
        ) from error
    return model.eval(), processor


def _prompts(call: Mapping[str, Any]) -> list[str]:
    prompt = call.get("prompt")
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if isinstance(prompts, (list, tuple)) and prompts:
        texts = [text for text in prompts if isinstance(text, str)]
        if len(texts) == len(prompts):
            return texts
    raise ConfigError(
        "the CLIP score compares images with their prompt, and the call has none",
        where="call['prompt']",
        got=repr(prompt) if "prompt" in call else "no such argument",
        expected="a text, or a list of texts",
        remedy=f"give the pipeline its prompt as text; {_OTHERWISE}",
    )


def _prompt_of_each(prompts: list[str], images: int) -> list[str]:
    """Repeat each prompt for its images, which diffusers keeps next to one another."""
    each, rest = divmod(images, len(prompts))
    if rest:
        raise ConfigError(
            "the prompts do not fit the images",
            where="call['prompt']",
            got=f"{len(prompts)} prompts, {images} images",
            expected="as many images for each prompt",
        )
    return [prompt for prompt in prompts for _ in range(each)]


def import_optional(package: str, user: str) -> Any:
    """Import an optional package.

    Raises:
        ConfigError: it is missing, or broken.
    """
    where = f"Python environment {sys.prefix}"
    if importlib.util.find_spec(package) is None:
        raise ConfigError(
            f"{user} needs the package {package}, which is not installed",
            where=where,
            remedy=f"pip install {package}; {_OTHERWISE}",
        )
    try:
        return importlib.import_module(package)
    except Exception as error:  # a build for another torch fails in its own ways
        raise ConfigError(
            f"{user} needs the package {package}, which cannot be imported",
            where=where,
            got=f"{type(error).__name__}: {error}",
            remedy=f"install the build of {package} that fits torch {torch.__version__}; "
            f"{_OTHERWISE}",
        ) from error
