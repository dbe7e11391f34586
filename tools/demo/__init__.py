"""``ditfastattn demo``: an embedded model, dense and by three plans, side by side."""
