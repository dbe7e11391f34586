"""What is known of a diffusers pipeline: its transformer, guidance and prompts."""
