"""Train the emoji model: at 32x32 first, then at 64x64.

    npm pack @lobehub/fluent-emoji-3d@1.1.0
    python -m ditfastattn.tools.emoji.train --package lobehub-fluent-emoji-3d-1.1.0.tgz \
        --work /tmp/emoji

Every ``--save-every`` steps the model, its moving average and the optimizers are saved in
``--work`` (safetensors and JSON, replaced atomically). An interrupted run resumes from there.
``--steps`` is the length of the last stage: a finished run continues when it is given more.
`publish` writes the pipeline of a checkpoint, finished or not; `evaluate` says whether it is good
enough to ship.

Rectified flow: at noise level sigma the model sees ``(1 - sigma) * image + sigma * noise`` and
predicts ``noise - image``.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from ditfastattn.tools.emoji.model import CaptionedTransformer
from ditfastattn.tools.emoji.recipe import (
    LABEL_DROPOUT,
    STAGES,
    VOCABULARY,
    Stage,
    learning_rate,
)
from ditfastattn.tools.emoji.sprites import compose, load_sprites, training_tokens
from ditfastattn.tools.training import move_average, set_image_size, update
from ditfastattn.tools.training_state import TrainingState


def optimizers_of(model: CaptionedTransformer) -> list[torch.optim.Optimizer]:
    """Return Muon for the matrices of the blocks, AdamW for everything else."""
    matrices: list[Tensor] = []
    rest: list[Tensor] = []
    for name, parameter in model.named_parameters():
        in_block = "transformer_blocks" in name and parameter.ndim == 2
        is_matrix = in_block and "scale_shift_table" not in name
        (matrices if is_matrix else rest).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=1.0, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1.0, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], rate: float) -> None:
    """Set Muon's rate to ``rate`` and AdamW's to half of it."""
    for optimizer, factor in zip(optimizers, (1.0, 0.5), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = factor * rate


def training_loss(
    model: CaptionedTransformer, sprites: Tensor, stage: Stage, generator: torch.Generator
) -> Tensor:
    """Return the mean squared error over one random batch."""
    tokens = training_tokens(stage.batch, generator)
    images = compose(sprites, tokens, stage.size, generator)
    dropped = torch.rand(stage.batch, generator=generator) < LABEL_DROPOUT
    tokens = torch.where(dropped[:, None], torch.tensor(VOCABULARY.null), tokens)
    sigmas = noise_levels(stage, generator)
    noise = torch.randn(images.shape, generator=generator)
    weight = sigmas.view(-1, 1, 1, 1)
    predicted = model((1 - weight) * images + weight * noise, sigmas, tokens)
    return functional.mse_loss(predicted, noise - images)


def noise_levels(stage: Stage, generator: torch.Generator) -> Tensor:
    """Return random noise levels: mostly in the middle, a fifth of them anywhere in [0, 1]."""
    middle = torch.sigmoid(torch.randn(stage.batch, generator=generator) + stage.noise_shift)
    anywhere = torch.rand(stage.batch, generator=generator)
    return torch.where(torch.rand(stage.batch, generator=generator) < 0.2, anywhere, middle)


def train_stage(
    number: int,
    stage: Stage,
    model: CaptionedTransformer,
    average: dict[str, Tensor],
    sprites: Tensor,
    args: argparse.Namespace,
) -> float:
    """Run stage ``number`` to its end, from its last checkpoint if any; return the loss."""
    set_image_size(model.transformer, stage.size)
    optimizers = optimizers_of(model)
    state = TrainingState(Path(args.work))
    progress = state.load(model, average, optimizers, number)
    loss_average = float(str(progress.get("loss", 1.0)))
    if int(str(progress.get("stage", 0))) > number:
        return loss_average
    first = int(str(progress["step"])) if progress.get("stage") == number else 0
    generator = torch.Generator().manual_seed(1_000_000 * number + first)
    began = time.monotonic()
    for step in range(first, stage.steps):
        set_learning_rate(optimizers, learning_rate(stage, step))
        loss = training_loss(model, sprites, stage, generator)
        update(model, optimizers, loss)
        decay = min(0.998, (step + 1) / (step + 10)) if number == 0 else 0.998
        move_average(average, model, decay)
        loss_average += 0.02 * (loss.item() - loss_average)
        if (step + 1) % args.save_every == 0 or step + 1 == stage.steps:
            pace = (time.monotonic() - began) / (step + 1 - first)
            reached = {"stage": number, "step": step + 1, "loss": loss_average, **asdict(stage)}
            state.save(model, average, optimizers, reached)
            print(
                f"{stage.size}px step {step + 1}/{stage.steps} loss {loss_average:.4f}"
                f" {pace:.2f} s/step",
                flush=True,
            )
    return loss_average


def main() -> None:
    """Train all stages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--package", required=True, help="the package that npm pack downloaded")
    parser.add_argument("--work", required=True, help="folder of the checkpoints")
    parser.add_argument("--steps", type=int, default=STAGES[-1].steps, help="of the last stage")
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_flush_denormal(True)
    sprites = load_sprites(Path(args.package))
    model = CaptionedTransformer().train()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    stages = (*STAGES[:-1], replace(STAGES[-1], steps=args.steps))
    for number, stage in enumerate(stages):
        train_stage(number, stage, model, average, sprites, args)


if __name__ == "__main__":
    main()
