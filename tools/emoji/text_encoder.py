"""The text encoder of the emoji model: a table of word embeddings, with its vocabulary."""

from __future__ import annotations

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor, nn

from ditfastattn.tools.emoji.captions import Caption, Vocabulary


class WordTable(ModelMixin, ConfigMixin):  # type: ignore[misc]  # diffusers' own way to define models
    """Look up the embeddings of a caption's words; the last row is that of the null word.

    diffusers saves the vocabulary in the component's configuration.
    """

    @register_to_config  # type: ignore[untyped-decorator]  # diffusers has no annotation
    def __init__(
        self, things: list[str], hues: list[str], facings: list[str], channels: int
    ) -> None:
        """Make an untrained table of ``channels`` numbers a word."""
        super().__init__()  # type: ignore[no-untyped-call]  # as above
        self.vocabulary = Vocabulary(tuple(things), tuple(hues), tuple(facings))
        self.embedding = nn.Embedding(self.vocabulary.null + 1, channels)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return ``[B, 3, channels]`` for ``tokens`` ``[B, 3]``."""
        embedded: Tensor = self.embedding(tokens)
        return embedded

    def tokenize(self, captions: list[Caption]) -> Tensor:
        """Return the tokens ``[B, 3]`` of ``captions``."""
        return torch.tensor([self.vocabulary.tokens(caption) for caption in captions])
