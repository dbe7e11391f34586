"""A book of plans: for each tier of quality, resolution and number of steps the plan that fits."""
