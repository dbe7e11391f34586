"""Train the embedded digits DiT: at 32x32 first, then fine-tuned at 64x64.

    python -m ditfastattn.tools.train_digits --work /tmp/digits --out tools/assets/digits-dit-64

Every ``--save-every`` steps the model, its moving average and the optimizer are written to
``--work`` (safetensors and JSON, replaced atomically); a run that was stopped goes on from there,
and a run that was finished only writes ``--out`` again.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed
from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn import functional

from ditfastattn.core.files import replacing, write_text_atomically
from ditfastattn.tools.digits_data import NUM_CLASSES, digit_images
from ditfastattn.tools.digits_pipeline import TRAIN_COMMAND, DigitsPipeline

TARGET_SIZE = 64
PATCH_SIZE = 2
MODEL_CONFIG: dict[str, Any] = {
    "num_attention_heads": 6,
    "attention_head_dim": 32,
    "in_channels": 1,
    "out_channels": 1,
    "num_layers": 6,
    "sample_size": TARGET_SIZE,
    "patch_size": PATCH_SIZE,
    "num_embeds_ada_norm": NUM_CLASSES,
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
}
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 1e-4,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "prediction_type": "epsilon",
}
# Pixels lie in [-1, 1]: a ceiling of 1 makes "dynamic thresholding" a plain clip of the predicted
# image, without which 20 steps leave burnt-out specks.
SAMPLER = SCHEDULE | {"thresholding": True, "sample_max_value": 1.0}


@dataclass(frozen=True)
class Stage:
    """Hold one training stage: image size in pixels, optimizer steps, batch, peak step size."""

    size: int
    steps: int
    batch: int
    learning_rate: float
    warmup: int = 100


STAGES = (
    Stage(size=32, steps=1900, batch=16, learning_rate=5e-4),
    Stage(size=64, steps=400, batch=8, learning_rate=2e-4),
)


def build_model() -> DiTTransformer2DModel:
    """Return the untrained 64x64 model."""
    model: DiTTransformer2DModel = DiTTransformer2DModel(**MODEL_CONFIG)
    return model


def set_image_size(model: DiTTransformer2DModel, size: int) -> None:
    """Give each patch of a ``size`` x ``size`` image the position code of its place at 64x64."""
    patches = size // PATCH_SIZE
    embedding = get_2d_sincos_pos_embed(
        model.inner_dim,
        patches,
        base_size=patches,
        interpolation_scale=size / TARGET_SIZE,
        output_type="pt",
    )
    patch_embedding: Any = model.pos_embed
    patch_embedding.pos_embed = embedding.float().unsqueeze(0)
    patch_embedding.height = patch_embedding.width = patches
    model.height = model.width = patches


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


def write_atomically(path: Path, tensors: dict[str, Tensor]) -> None:
    """Save ``tensors`` so that ``path`` holds either the old or the new file, never a part."""
    copies = {name: tensor.detach().contiguous().clone() for name, tensor in tensors.items()}
    with replacing(path) as temporary:
        save_file(copies, temporary)


class Checkpoint:
    """Keep the weights, their moving average and the Adam moments of one training run on disk."""

    def __init__(self, folder: Path) -> None:
        """Use ``folder``, made if absent."""
        folder.mkdir(parents=True, exist_ok=True)
        self.tensors = folder / "train.safetensors"
        self.progress = folder / "progress.json"

    def save(
        self,
        model: torch.nn.Module,
        average: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        progress: dict[str, object],
    ) -> None:
        """Write everything needed to go on."""
        tensors = {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in average.items()}
        for index, state in optimizer.state_dict()["state"].items():
            tensors |= {f"adam.{index}.{name}": value for name, value in state.items()}
        write_atomically(self.tensors, tensors)
        write_text_atomically(self.progress, json.dumps(progress, indent=2))

    def load(
        self,
        model: torch.nn.Module,
        average: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        same_stage: int,
    ) -> dict[str, object]:
        """Restore what ``save`` wrote; return its progress, empty for a new run."""
        if not self.progress.exists():
            return {}
        progress: dict[str, object] = json.loads(self.progress.read_text())
        tensors = load_file(self.tensors)
        model.load_state_dict(_under("model.", tensors))
        average.update(_under("average.", tensors))
        if progress["stage"] == same_stage:
            restored = optimizer.state_dict()
            moments: dict[int, dict[str, Tensor]] = {}
            for name, value in _under("adam.", tensors).items():
                index, moment = name.split(".")
                moments.setdefault(int(index), {})[moment] = value
            optimizer.load_state_dict(restored | {"state": moments})
        return progress


def _under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    found = ((name, value) for name, value in tensors.items() if name.startswith(prefix))
    return {name.removeprefix(prefix): value for name, value in found}


def learning_rate(stage: Stage, step: int) -> float:
    """Return the step size: linear warm-up, then linear decay to a tenth."""
    if step < stage.warmup:
        return stage.learning_rate * (step + 1) / stage.warmup
    return stage.learning_rate * (1.0 - 0.9 * step / stage.steps)


def train_stage(
    number: int, model: DiTTransformer2DModel, average: dict[str, Tensor], args: argparse.Namespace
) -> float:
    """Run stage ``number`` to its end, from its last checkpoint if any; return the loss."""
    stage = STAGES[number]
    set_image_size(model, stage.size)
    images, labels = digit_images(stage.size)
    alpha_bar = noise_levels()
    optimizer = torch.optim.AdamW(model.parameters(), lr=stage.learning_rate, weight_decay=0.01)
    checkpoint = Checkpoint(Path(args.work))
    progress = checkpoint.load(model, average, optimizer, number)
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
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]  # torch has no annotation
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10)) if number == 0 else 0.995
        with torch.no_grad():
            for name, value in model.state_dict().items():
                average[name].lerp_(value, 1.0 - decay)
        loss_average += 0.02 * (loss.item() - loss_average)
        if (step + 1) % args.save_every == 0 or step + 1 == stage.steps:
            pace = (time.monotonic() - began) / (step + 1 - first)
            state = {"stage": number, "step": step + 1, "loss": loss_average, **asdict(stage)}
            checkpoint.save(model, average, optimizer, state)
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
    for file in out.rglob("*.*"):
        if file.is_file():
            file.chmod(0o644)  # safetensors makes private files; a package is not


def model_card(parameters: int, loss: float) -> str:
    """Return the text of the model card: data, architecture, training, use and limits."""
    stages = "\n".join(
        f"| {stage.size}x{stage.size} | {stage.steps} | {stage.batch} | {stage.learning_rate:g} |"
        for stage in STAGES
    )
    tokens = (TARGET_SIZE // PATCH_SIZE) ** 2
    heads, head_dim = MODEL_CONFIG["num_attention_heads"], MODEL_CONFIG["attention_head_dim"]
    return _CARD.format(
        size=TARGET_SIZE,
        parameters=f"{parameters / 1e6:.1f}",
        layers=MODEL_CONFIG["num_layers"],
        heads=heads,
        head_dim=head_dim,
        width=heads * head_dim,
        patch=PATCH_SIZE,
        tokens=tokens,
        stages=stages,
        loss=f"{loss:.4f}",
        null_class=NUM_CLASSES,
        train_command=TRAIN_COMMAND,
        **{name: SCHEDULE[name] for name in ("beta_start", "beta_end", "num_train_timesteps")},
    )


_CARD = """\
---
license: apache-2.0
library_name: diffusers
tags: [diffusion, class-conditional, handwritten-digits]
---

# Digits DiT, {size}x{size}

A small class-conditional diffusion transformer that draws handwritten digits in pixel space. It
is embedded in `ditfastattn`, so that the demo and the tests run on a *trained* model without a
download.

```python
from ditfastattn.tools.digits_pipeline import embedded_pipeline

images = embedded_pipeline()(class_labels=[3, 7], guidance_scale=2.0).images
```

## Data

The digits bundled with scikit-learn (`sklearn.datasets.load_digits`): 1797 greyscale 8x8 images of
the digits 0 to 9, the test part of the UCI "Optical Recognition of Handwritten Digits" data set,
upscaled bicubically. All 1797 are used for training.

## Architecture

diffusers' `DiTTransformer2DModel`: {layers} layers, {heads} heads of {head_dim} (width {width}),
patch {patch}, one channel, {tokens} tokens at {size}x{size}, {parameters} million parameters,
stored as fp16. Class {null_class} is the null class of classifier-free guidance.

## Training

AdamW (weight decay 0.01), gradients clipped to norm 1, linear warm-up and decay, mean squared
error of the predicted noise, {num_train_timesteps} timesteps, linear beta from {beta_start:g} to
{beta_end:g}. The weights are the moving average. The lower resolution uses every second position
code of the higher one.

| image | steps | batch | peak learning rate |
|---|---|---|---|
{stages}

Final training loss (moving average): {loss}. In training mode diffusers' label embedding drops a
label with probability 0.1 in each layer separately; all layers see the null class together only
when sampling.

The published run was planned longer and cut to these steps while it ran, so that its step size had
decayed less than the table implies: retraining gives a like model, not the same weights.

Retrain (it goes on from `--work` where it was stopped):

```sh
{train_command}
```

## Sampler

DPM-Solver++ (2M), 20 steps, guidance 2.0, the predicted image clipped to [-1, 1].

## Evaluation

```sh
python -m ditfastattn.tools.evaluate_digits --out digits.json
```

It draws 100 digits and counts those that a support vector machine, fitted on the real digits,
reads as the digit asked for; the classifier's own held-out accuracy stands beside it.

## Intended use and limits

Demonstrations and tests of `ditfastattn`, nothing else. The images carry no more detail than the
8x8 originals. The classifier saw the data that the model was trained on, so its reading tells that
a digit is the right one, not that it is new: copies of training images are not ruled out.
Numbers measured on this model do not carry over to large models.

Licence of the weights: Apache-2.0. Data: E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998.
"""


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
