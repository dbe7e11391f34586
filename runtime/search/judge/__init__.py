"""Judge images against a target."""
