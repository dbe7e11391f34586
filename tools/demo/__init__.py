"""``ditfastattn demo``: the embedded model, dense and by three plans, side by side."""
