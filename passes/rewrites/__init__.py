"""Rewrite the dense graph into that of one step: one pass a file."""
