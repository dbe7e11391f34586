"""Tiny Helios models, and the inputs of one step."""

from __future__ import annotations

from typing import Any

from ditfastattn.tools.zoo.base import ZooModel, noise
from ditfastattn.tools.zoo.video_inputs import CHANNELS, SIZE, TEXT_DIM, history, steps, text, video


def _helios(batch: int, timestep: float) -> dict[str, Any]:
    short, middle, long, current = history()
    shape = (SIZE, SIZE)
    return {
        "hidden_states": video(batch),
        "timestep": steps(batch, timestep),
        "encoder_hidden_states": text(batch),
        "indices_hidden_states": current.unsqueeze(0),
        "indices_latents_history_short": short.unsqueeze(0),
        "indices_latents_history_mid": middle.unsqueeze(0),
        "indices_latents_history_long": long.unsqueeze(0),
        "latents_history_short": noise(4, batch, CHANNELS, 2, *shape),
        "latents_history_mid": noise(5, batch, CHANNELS, 2, *shape),
        "latents_history_long": noise(6, batch, CHANNELS, 4, *shape),
        "attention_kwargs": None,
        "return_dict": False,
    }


MODELS: tuple[ZooModel, ...] = (
    ZooModel(
        "HeliosTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": CHANNELS,
            "out_channels": CHANNELS,
            "text_dim": TEXT_DIM,
            "freq_dim": 32,
            "ffn_dim": 64,
            "num_layers": 2,
            "rope_dim": (4, 6, 6),
        },
        _helios,
    ),
)
