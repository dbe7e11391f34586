"""A small text-to-image DiT that draws 3-D emoji: its captions, data, training and pipeline."""
