"""The model card of the embedded digits DiT."""

from __future__ import annotations

from ditfastattn.tools.digits_data import NUM_CLASSES
from ditfastattn.tools.digits_pipeline import TRAIN_COMMAND
from ditfastattn.tools.digits_recipe import (
    MODEL_CONFIG,
    PATCH_SIZE,
    SCHEDULE,
    STAGES,
    TARGET_SIZE,
)


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
embedding of the higher one.

| image | steps | batch | peak learning rate |
|---|---|---|---|
{stages}

Final training loss (moving average): {loss}. In training mode diffusers' label embedding drops a
label with probability 0.1 in each layer separately; all layers see the null class together only
when sampling.

The published run was planned with more steps and stopped at these, so its learning rate had decayed
less than the table implies. Retraining gives a similar model, not the same weights.

Retrain (an interrupted run resumes from `--work`):

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
assigns to the requested class; the classifier's own held-out accuracy is reported beside it.

## Intended use and limits

Demonstrations and tests of `ditfastattn`, nothing else. The images carry no more detail than the
8x8 originals. The classifier saw the data that the model was trained on, so it shows that
a digit is the right one, not that it is new: copies of training images are not ruled out.
Numbers measured on this model do not carry over to large models.

Licence of the weights: Apache-2.0. Data: E. Alpaydin and C. Kaynak, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, 1998.
"""
