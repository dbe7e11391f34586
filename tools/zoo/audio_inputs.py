"""Sizes shared by audio transformers; their other inputs are those of video."""

from __future__ import annotations

TOKENS = 48
CHANNELS = 8  # of latents
