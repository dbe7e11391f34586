"""Learn from a captured graph without changing it."""
