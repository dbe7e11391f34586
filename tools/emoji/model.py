"""The transformer and the text encoder of the emoji model, as they are trained."""

from __future__ import annotations

from typing import Any

from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor, nn

from ditfastattn.tools.emoji.recipe import CAPTION_CHANNELS, MODEL_CONFIG, VOCABULARY
from ditfastattn.tools.emoji.text_encoder import WordTable


class CaptionedTransformer(nn.Module):
    """The transformer and its text encoder: what is trained together."""

    def __init__(self, **changes: Any) -> None:
        """Make an untrained pair, the residual branches of which start at zero.

        ``changes`` are to the transformer's configuration.
        """
        super().__init__()
        self.transformer: Any = PixArtTransformer2DModel(**MODEL_CONFIG | changes)
        self.text_encoder: Any = WordTable(
            list(VOCABULARY.things),
            list(VOCABULARY.hues),
            list(VOCABULARY.facings),
            CAPTION_CHANNELS,
        )
        blocks = self.transformer.transformer_blocks
        layers = [self.transformer.proj_out, self.transformer.adaln_single.linear]
        for layer in layers + [block.attn2.to_out[0] for block in blocks]:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
        for block in blocks:
            nn.init.zeros_(block.scale_shift_table)

    def forward(self, noisy: Tensor, sigmas: Tensor, tokens: Tensor) -> Tensor:
        """Return the predicted ``noise - image``."""
        predicted: Tensor = self.transformer(
            noisy,
            encoder_hidden_states=self.text_encoder(tokens),
            timestep=sigmas * 1000,
            added_cond_kwargs={"resolution": None, "aspect_ratio": None},
        ).sample
        return predicted
