"""Compare ditfastattn with caching libraries, the alternatives to it."""
