"""Train the embedded digits DiT: at 32x32 first, then fine-tuned at 64x64.

    python -m ditfastattn.tools.train_digits --work /tmp/digits --out tools/assets/digits-dit-64

Every ``--save-every`` steps the model, its moving average and the optimizer are saved in ``--work``
(safetensors and JSON, replaced atomically). An interrupted run resumes from there; a finished run
only writes ``--out`` again.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from torch import Tensor
from torch.nn import functional

from ditfastattn.core.files import write_text_atomically
from ditfastattn.tools.digits_card import model_card
from ditfastattn.tools.digits_data import digit_images
from ditfastattn.tools.digits_pipeline import DigitsPipeline
from ditfastattn.tools.digits_recipe import (
    MODEL_CONFIG,
    SAMPLER,
    SCHEDULE,
    STAGES,
    learning_rate,
)
from ditfastattn.tools.training import make_readable, move_average, set_image_size, update
from ditfastattn.tools.training_state import TrainingState


def build_model() -> DiTTransformer2DModel:
    """Return the untrained 64x64 model."""
    model: DiTTransformer2DModel = DiTTransformer2DModel(**MODEL_CONFIG)
    return model


def noise_levels() -> Tensor:
    """Return the cumulative signal fraction (alpha-bar) of the 1000 training timesteps."""
    betas = torch.linspace(
        SCHEDULE["beta_start"], SCHEDULE["beta_end"], SCHEDULE["num_train_timesteps"]
    )
    return torch.cumprod(1.0 - betas, dim=0)


def training_loss(
    model: DiTTransformer2DModel,
    images: Tensor,
    labels: Tensor,
    alpha_bar: Tensor,
    generator: torch.Generator,
) -> Tensor:
    """Return the mean squared error of the predicted noise at random timesteps."""
    timesteps = torch.randint(len(alpha_bar), (len(images),), generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    signal = alpha_bar[timesteps].view(-1, 1, 1, 1)
    noisy = signal.sqrt() * images + (1.0 - signal).sqrt() * noise
    predicted = model(noisy, timestep=timesteps, class_labels=labels).sample
    return functional.mse_loss(predicted, noise)


def train_stage(
    number: int, model: DiTTransformer2DModel, average: dict[str, Tensor], args: argparse.Namespace
) -> float:
    """Run stage ``number`` to its end, from its last checkpoint if any; return the loss."""
    stage = STAGES[number]
    set_image_size(model, stage.size)
    images, labels = digit_images(stage.size)
    alpha_bar = noise_levels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, weight_decay=0.01)
    state = TrainingState(Path(args.work))
    progress = state.load(model, average, [optimizer], number)
    if int(str(progress.get("stage", 0))) > number:
        return float(str(progress["loss"]))
    first = int(str(progress["step"])) if progress.get("stage") == number else 0
    generator = torch.Generator().manual_seed(1000 * number + first)
    loss_average, began = float(str(progress.get("loss", 1.0))), time.monotonic()
    for step in range(first, stage.steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(stage, step)
        chosen = torch.randint(len(images), (stage.batch,), generator=generator)
        loss = training_loss(model, images[chosen], labels[chosen], alpha_bar, generator)
        update(model, [optimizer], loss)
        decay = min(0.999, (step + 1) / (step + 10)) if number == 0 else 0.995
        move_average(average, model, decay)
        loss_average += 0.02 * (loss.item() - loss_average)
        if (step + 1) % args.save_every == 0 or step + 1 == stage.steps:
            pace = (time.monotonic() - began) / (step + 1 - first)
            reached = {"stage": number, "step": step + 1, "loss": loss_average, **asdict(stage)}
            state.save(model, average, [optimizer], reached)
            print(
                f"{stage.size}px step {step + 1}/{stage.steps} loss {loss_average:.4f}"
                f" {pace:.2f} s/step",
                flush=True,
            )
    return loss_average


def save_pretrained(average: dict[str, Tensor], loss: float, out: Path) -> None:
    """Write the averaged weights (fp16), the sampler and the model card as a ``DigitsPipeline``."""
    model = build_model()
    model.load_state_dict(average)
    scheduler: Any = DPMSolverMultistepScheduler(**SAMPLER)
    model.half()  # type: ignore[no-untyped-call]  # diffusers has no annotation
    DigitsPipeline(model, scheduler).save_pretrained(out)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_text_atomically(out / "README.md", model_card(parameters, loss))
    make_readable(out)


def main() -> None:
    """Train all stages and save the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", required=True, help="folder of the checkpoints")
    parser.add_argument("--out", required=True, help="folder of the finished pipeline")
    parser.add_argument("--save-every", type=int, default=100)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = build_model().train()
    average = {name: value.clone() for name, value in model.state_dict().items()}
    loss = 0.0
    for number in range(len(STAGES)):
        loss = train_stage(number, model, average, args)
    save_pretrained(average, loss, Path(args.out))


if __name__ == "__main__":
    main()
