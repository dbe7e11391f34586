"""Write the pipeline of a checkpoint: averaged weights in fp16, model card and licence notice.

    python -m ditfastattn.tools.emoji.publish --work /tmp/emoji --out emoji-dit-64

A checkpoint of an earlier stage draws smaller pictures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from diffusers.schedulers.scheduling_flow_match_euler_discrete import (
    FlowMatchEulerDiscreteScheduler,
)
from torch import Tensor

from ditfastattn.core.files import write_text_atomically
from ditfastattn.tools.emoji.card import NOTICE, model_card
from ditfastattn.tools.emoji.model import CaptionedTransformer
from ditfastattn.tools.emoji.pipeline import EmojiPipeline
from ditfastattn.tools.emoji.recipe import SAMPLER, TARGET_SIZE
from ditfastattn.tools.training import make_readable
from ditfastattn.tools.training_state import TrainingState


def pipeline_of(average: dict[str, Tensor], size: int) -> EmojiPipeline:
    """Return the pipeline of the weights ``average`` for pictures of ``size`` pixels."""
    changes: dict[str, Any] = {}
    if size != TARGET_SIZE:
        changes = {"sample_size": size, "interpolation_scale": size / TARGET_SIZE}
    model = CaptionedTransformer(**changes)
    model.load_state_dict(average)
    scheduler: Any = FlowMatchEulerDiscreteScheduler(**SAMPLER)
    return EmojiPipeline(model.transformer.eval(), model.text_encoder.eval(), scheduler)


def publish(work: Path, out: Path) -> None:
    """Write the checkpoint in ``work`` as a pipeline to ``out``.

    Raises:
        ConfigError: there is no checkpoint in ``work``.
    """
    average, progress = TrainingState(work).average()
    pipeline = pipeline_of(average, int(str(progress["size"])))
    pipeline.transformer.half()  # type: ignore[no-untyped-call]  # diffusers has no annotation
    pipeline.save_pretrained(out)
    parameters = sum(value.numel() for value in average.values())
    write_text_atomically(out / "README.md", model_card(parameters, progress))
    write_text_atomically(out / "NOTICE.md", NOTICE)
    make_readable(out)


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, help="folder of the checkpoints")
    parser.add_argument("--out", required=True, help="folder of the pipeline")
    args = parser.parse_args()
    publish(Path(args.work), Path(args.out))


if __name__ == "__main__":
    main()
