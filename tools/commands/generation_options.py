"""Open the pipeline that the command line names, and say what generations are called with."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from ditfastattn.core.errors import ConfigError
from ditfastattn.runtime.pipeline.denoiser import transformer_of

_GROUP = "Pipeline"
_EMBEDDED = "the embedded digits model"
_INDEX = "model_index.json"

PipelineOption = Annotated[
    str,
    typer.Option(
        help=f"A diffusers pipeline: its folder, or its id on the hub. Without it {_EMBEDDED}.",
        rich_help_panel=_GROUP,
    ),
]
Classes = Annotated[
    str,
    typer.Option(help="Classes, with commas, of class-conditional models.", rich_help_panel=_GROUP),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="A text file with a prompt per line.", rich_help_panel=_GROUP),
]
Steps = Annotated[int, typer.Option(min=1, help="Sampler steps.", rich_help_panel=_GROUP)]
Guidance = Annotated[
    float | None,
    typer.Option(help="Guidance scale; without it the pipeline's own.", rich_help_panel=_GROUP),
]
CallOption = Annotated[
    str,
    typer.Option(
        help="""Other arguments of a generation as JSON, such as '{"height": 512}'.""",
        rich_help_panel=_GROUP,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(help="Load weights as float32, float16 or bfloat16.", rich_help_panel=_GROUP),
]
Device = Annotated[str, typer.Option(help="Where to run, such as cuda; offload: weights in turns.")]

_DTYPES = ("float32", "float16", "bfloat16")
OFFLOAD = "offload"


def open_pipeline(name: str = "", dtype: str = "float32", device: str = "") -> Any:
    """Load the pipeline ``name``: a folder, an id on the hub, or "" for the embedded model.

    ``device`` "" is the GPU where there is one; "offload" keeps on it what runs alone.

    Raises:
        ConfigError: there is no such pipeline, or it has no transformer; weights are to be
            offloaded, and nothing is there to move them to.
    """
    if dtype not in _DTYPES:
        raise ConfigError("unknown dtype", where="--dtype", got=dtype, expected=", ".join(_DTYPES))
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
            "weights cannot be moved in turns",
            where=f"--device {OFFLOAD}",
            got=error,
            remedy="run where there is a GPU, or on --device cpu",
        ) from error


def _load(name: str, dtype: torch.dtype) -> Any:
    from ditfastattn.tools.digits_pipeline import DigitsPipeline, embedded_pipeline, load_pipeline

    if not name:
        return embedded_pipeline().to(dtype)
    index = Path(name) / _INDEX
    if index.is_file() and _class_name(index) == DigitsPipeline.__name__:
        return load_pipeline(Path(name)).to(dtype)
    from diffusers.pipelines.pipeline_utils import DiffusionPipeline

    try:
        return DiffusionPipeline.from_pretrained(name, torch_dtype=dtype)
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot load the pipeline",
            where="--pipeline",
            got=f"{name}: {error}",
            expected=f"a folder with {_INDEX}, or the id of a diffusers pipeline on the hub",
        ) from error


def _class_name(index: Path) -> str:
    try:
        data = json.loads(index.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            "cannot read the pipeline's index", where=str(index), got=error
        ) from error
    return str(data.get("_class_name")) if isinstance(data, dict) else ""


@dataclass(frozen=True)
class Generation:
    """Say what generations of a pipeline are called with."""

    steps: int | None = None
    guidance: float | None = None
    call: str = ""

    def arguments(self, pipeline: Any, classes: str, prompts: Path | None) -> dict[str, Any]:
        """Return keyword arguments, whose lists hold an entry per image.

        Raises:
            ConfigError: the pipeline takes other conditions, or an argument is none of its.
        """
        known = inspect.signature(pipeline.__call__).parameters
        arguments = _conditions(known, classes, prompts)
        if self.steps is not None:
            arguments["num_inference_steps"] = self.steps
        if self.guidance is not None:
            arguments["guidance_scale"] = self.guidance
        arguments |= _json_object(self.call)
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
            expected="--prompts FILE, a text file with a prompt per line",
        )
    try:
        lines = prompts.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("cannot read the prompts", where=str(prompts), got=error) from error
    texts = [line.strip() for line in lines if line.strip()]
    if not texts:
        raise ConfigError("there is no prompt", where=str(prompts), expected="one per line")
    return {"prompt": texts}


def integers(text: str, option: str) -> list[int]:
    """Read whole numbers with commas.

    Raises:
        ConfigError: they are something else.
    """
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise ConfigError(
            "classes are whole numbers", where=option, got=text, expected="for example 0,3,5"
        ) from error


def _json_object(text: str) -> dict[str, Any]:
    if not text:
        return {}
    try:
        data = json.loads(text)
    except ValueError as error:
        raise ConfigError("this is not JSON", where="--call", got=text) from error
    if not isinstance(data, dict):
        raise ConfigError(
            "this is not a JSON object", where="--call", got=text, expected='{"height": 512}'
        )
    return data
