"""Choose strategies under a budget."""
