"""Search which steps run, and within them which sites take shortcuts."""
