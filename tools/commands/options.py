"""Options that several commands share."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ditfastattn.runtime.lowering import Lowering
from ditfastattn.runtime.tensorrt.engines import Layout

_PIPELINE = "Pipeline"
_TARGET = "Target: one of"

PlanFile = Annotated[Path, typer.Argument(help="The plan's file.")]
BundleFolder = Annotated[Path, typer.Argument(help="The bundle's folder.")]
Seed = Annotated[int, typer.Option(help="First seed of the calibration's noise.")]

PipelineName = Annotated[
    str,
    typer.Option(
        help="A diffusers pipeline: a folder, an id on the hub, or an embedded model: emoji or "
        "digits (the default).",
        rich_help_panel=_PIPELINE,
    ),
]
Classes = Annotated[
    str,
    typer.Option(
        help="Classes for class-conditional models, separated by commas.",
        rich_help_panel=_PIPELINE,
    ),
]
Prompts = Annotated[
    Path | None,
    typer.Option(help="A text file with one prompt per line.", rich_help_panel=_PIPELINE),
]
Steps = Annotated[int, typer.Option(min=1, help="Sampler steps.", rich_help_panel=_PIPELINE)]
Guidance = Annotated[
    float | None,
    typer.Option(
        help="Guidance scale. Default: the pipeline's own.",
        rich_help_panel=_PIPELINE,
    ),
]
CallArguments = Annotated[
    str,
    typer.Option(
        help="""Other arguments of the pipeline's call, as JSON: '{"height": 512}'.""",
        rich_help_panel=_PIPELINE,
    ),
]
Dtype = Annotated[
    str,
    typer.Option(
        help="Dtype of the weights: float32, float16 or bfloat16.",
        rich_help_panel=_PIPELINE,
    ),
]
Device = Annotated[
    str,
    typer.Option(
        help="Where to run, such as cuda. offload: keep weights on the CPU and move each model to "
        "the GPU while it runs.",
        rich_help_panel=_PIPELINE,
    ),
]

MinSsim = Annotated[
    float | None, typer.Option(help="Least SSIM to dense, worst prompt.", rich_help_panel=_TARGET)
]
MinPsnr = Annotated[
    float | None,
    typer.Option(help="Least PSNR to dense in dB, worst prompt.", rich_help_panel=_TARGET),
]
MaxLpips = Annotated[
    float | None,
    typer.Option(help="Greatest LPIPS to dense, worst prompt.", rich_help_panel=_TARGET),
]
MaxFlip = Annotated[
    float | None,
    typer.Option(help="Greatest FLIP error to dense, worst prompt.", rich_help_panel=_TARGET),
]
MaxFeatureDistance = Annotated[
    float | None,
    typer.Option(
        help="Greatest distance of EfficientNet's features to dense, worst prompt.",
        rich_help_panel=_TARGET,
    ),
]
MinClipScore = Annotated[
    float | None, typer.Option(help="Least CLIP score, worst prompt.", rich_help_panel=_TARGET)
]
MinSpeedup = Annotated[
    float | None,
    typer.Option(help="Least speedup over dense, both compiled.", rich_help_panel=_TARGET),
]
MaxLatency = Annotated[
    float | None,
    typer.Option(help="Most seconds per generation, compiled.", rich_help_panel=_TARGET),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        help="Greatest error of the model's output (the paper's delta, 0.025 to 0.15).",
        rich_help_panel=_TARGET,
    ),
]
MetricName = Annotated[
    str, typer.Option(help="Your own metric: package.module:function.", rich_help_panel=_TARGET)
]
LowerBound = Annotated[
    float | None,
    typer.Option(help="Bound of --metric if more is better.", rich_help_panel=_TARGET),
]
UpperBound = Annotated[
    float | None,
    typer.Option(help="Bound of --metric if less is better.", rich_help_panel=_TARGET),
]

Compiler = Annotated[Lowering, typer.Option(help="What compiles the generations that are timed.")]
MaxVariants = Annotated[
    int, typer.Option(min=0, help="Most distinct step variants of a plan. 0: no cap.")
]
Json = Annotated[
    bool,
    typer.Option("--json", help="Print the result as JSON; everything else to standard error."),
]
NoiseSeed = Annotated[
    int, typer.Option(help="First seed of the noise. Searches do not use the default.")
]
ReportFile = Annotated[
    Path | None, typer.Option(help="HTML file to write a report to: one page, no network.")
]
Restart = Annotated[bool, typer.Option(help="Discard the state of an unfinished run.")]

EngineTarget = Annotated[
    str, typer.Option(help="Compute capability of the GPU, such as sm89. current: this machine's.")
]
EngineLayout = Annotated[
    Layout, typer.Option(help="One engine per step variant, one with all, or the whole loop.")
]
