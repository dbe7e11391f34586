"""Run a plan of whole steps on a transformer that diffusers shards over two gloo processes."""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from diffusers.models._modeling_parallel import ContextParallelConfig
from safetensors.torch import save_file

import ditfastattn
from ditfastattn import Target
from ditfastattn.runtime.pipeline.prompts import Prompt, generate, split_prompts
from ditfastattn.runtime.search.whole_steps.calibrate import Options, calibrate_whole_steps
from tests.tiny_pipelines import TINY_PIPELINES


def main(rank: int, folder: Path) -> None:
    """Generate alone and sharded, by the same plan; write the images."""
    torch.set_num_threads(1)
    make, given = TINY_PIPELINES["flux"]
    pipeline, call = make(), {"num_inference_steps": 6, **given}
    options = Options(Target.min_speedup(2.0), opaque=True)
    prompts, unseen = split_prompts(call, 0), split_prompts(call, 500)
    plan = calibrate_whole_steps(pipeline, prompts, unseen, options)
    ditfastattn.accelerate(pipeline, plan)
    alone = generate(pipeline, Prompt(call, 9))
    ditfastattn.restore(pipeline)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=2,
        timeout=timedelta(seconds=60),
    )
    count = torch.accelerator.device_count
    torch.accelerator.device_count = lambda: count() or 1  # diffusers divides by it, on a CPU too
    pipeline.transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    ditfastattn.accelerate(pipeline, plan)
    sharded = generate(pipeline, Prompt(call, 9))
    save_file({"alone": alone, "sharded": sharded}, folder / f"{rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
