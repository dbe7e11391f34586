"""Tiny configurations of diffusers' transformers, to try the compiler on each of them."""

from ditfastattn.tools.zoo.audio import AUDIO_MODELS
from ditfastattn.tools.zoo.base import ZooModel
from ditfastattn.tools.zoo.images import IMAGE_MODELS
from ditfastattn.tools.zoo.video import VIDEO_MODELS

ZOO: tuple[ZooModel, ...] = (*IMAGE_MODELS, *VIDEO_MODELS, *AUDIO_MODELS)
