"""Search which steps of a generation run, and fit the model's output at the others."""
