"""Export planned models; nothing is here yet."""
