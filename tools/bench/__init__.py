"""Compare ditfastattn with the caching libraries that a user could pick instead."""
