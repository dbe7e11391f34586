"""Hold what everything stands on: errors, environment knobs, files; it imports nothing of ours."""
