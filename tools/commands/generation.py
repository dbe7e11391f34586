"""Open the pipeline that the command line names, and make the arguments of its generations."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ditfastattn.core.errors import ConfigError
from ditfastattn.core.strict_json import parse_json, read_json, read_text
from ditfastattn.runtime.pipeline.denoiser import transformer_of
from ditfastattn.tools.embedded import ModelName, embedded_model
from ditfastattn.tools.terminal import open_console, spinner

log = logging.getLogger(__name__)
_INDEX = "model_index.json"
_DTYPES = ("float32", "float16", "bfloat16")
OFFLOAD = "offload"


def open_pipeline(name: str = "", dtype: str = "float32", device: str = "") -> Any:
    """Load the pipeline ``name``: a folder, an id on the hub, or an embedded model.

    The embedded ones are named "emoji" and "digits"; "" is the latter.

    ``device`` "" is the GPU if there is one, else the CPU; with "offload" each of the pipeline's
    models is on the GPU only while it runs.

    Raises:
        ConfigError: there is no such pipeline, or it has no transformer; ``device`` is "offload"
            and there is no GPU.
    """
    if dtype not in _DTYPES:
        raise ConfigError("unknown dtype", where="--dtype", got=dtype, expected=", ".join(_DTYPES))
    with spinner(open_console(stderr=True), "loading the pipeline"):
        return _opened(name, dtype, device)


def _opened(name: str, dtype: str, device: str) -> Any:
    pipeline = _load(name, getattr(torch, dtype))
    pipeline.set_progress_bar_config(disable=True)
    transformer_of(pipeline, f"--pipeline {name}")
    chosen = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if chosen == OFFLOAD:
        _offload(pipeline)
    else:
        pipeline.to(chosen)
    return pipeline


def _offload(pipeline: Any) -> None:
    try:
        pipeline.enable_model_cpu_offload()
    except RuntimeError as error:
        raise ConfigError(
            "weights cannot be offloaded",
            where=f"--device {OFFLOAD}",
            got=error,
            remedy="use a machine with a GPU, or --device cpu",
        ) from error


def _load(name: str, dtype: torch.dtype) -> Any:
    if name in ("", *ModelName):
        if (Path(name) / _INDEX).is_file() and name:
            log.warning("--pipeline %s is the embedded model; the folder is ./%s", name, name)
        return embedded_model(ModelName(name or ModelName.DIGITS)).open().to(dtype)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    from ditfastattn.tools import digits_pipeline
    from ditfastattn.tools.emoji import pipeline as emoji_pipeline

    loaders: dict[str, Callable[[Path], DiffusionPipeline]] = {
        digits_pipeline.DigitsPipeline.__name__: digits_pipeline.load_pipeline,
        emoji_pipeline.EmojiPipeline.__name__: emoji_pipeline.load_pipeline,
    }
    load = loaders.get(_class_name(Path(name) / _INDEX))
    if load is not None:
        return load(Path(name)).to(dtype)

    try:
        return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot load the pipeline",
            where="--pipeline",
            got=f"{name}: {error}",
            expected=f"a folder with {_INDEX}, the id of a diffusers pipeline on the hub, "
            f"or {' or '.join(ModelName)}",
        ) from error


def _class_name(index: Path) -> str:
    if not index.is_file():
        return ""
    data = read_json(index, "the pipeline's index")
    return str(data.get("_class_name")) if isinstance(data, dict) else ""


@dataclass(frozen=True)
class Generation:
    """Arguments of a pipeline's generations, as the command line gives them."""

    steps: int | None = None
    guidance: float | None = None
    call: str = ""

    def arguments(self, pipeline: Any, classes: str, prompts: Path | None) -> dict[str, Any]:
        """Return keyword arguments; lists hold one entry per image.

        Raises:
            ConfigError: a condition that the pipeline needs is missing or malformed, or the
                pipeline does not take an argument.
        """
        known = inspect.signature(pipeline.__call__).parameters
        arguments = _conditions(known, classes, prompts)
        if self.steps is not None:
            arguments["num_inference_steps"] = self.steps
        if self.guidance is not None:
            arguments["guidance_scale"] = self.guidance
        arguments |= json_object(self.call)
        unknown = sorted(set(arguments) - set(known))
        if unknown:
            raise ConfigError(
                "the pipeline does not take this argument",
                where="the command line",
                got=", ".join(unknown),
                expected=", ".join(name for name in known if name != "self"),
            )
        return arguments


def _conditions(known: Any, classes: str, prompts: Path | None) -> dict[str, Any]:
    if "class_labels" in known:
        return {"class_labels": integers(classes, "--classes")}
    if prompts is None:
        raise ConfigError(
            "the pipeline needs prompts",
            where="the command line",
            expected="--prompts FILE, a text file with one prompt per line",
        )
    return {"prompt": read_prompts(prompts)}


def read_prompts(path: Path) -> list[str]:
    """Return the prompts in ``path``, one a line.

    Raises:
        ConfigError: there is none, or the file cannot be read.
    """
    lines = read_text(path, "the prompts").splitlines()
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigError("the file holds no prompt", where=str(path), expected="one per line")
    return texts


def integers(text: str, option: str) -> list[int]:
    """Parse integers separated by commas.

    Raises:
        ConfigError: ``text`` is something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            "not integers", where=option, got=text, expected="for example 0,3,5"
        ) from error


def json_object(text: str) -> dict[str, Any]:
    """Parse the arguments of ``--call``.

    Raises:
        ConfigError: ``text`` is not a JSON object.
    """
    if not text:
        return {}
    data = parse_json(text, "--call", "the argument")
    if not isinstance(data, dict):
        raise ConfigError("not a JSON object", where="--call", got=text, expected='{"height": 512}')
    return data
