"""Search a plan for a target that a user states."""
