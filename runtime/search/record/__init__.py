"""Keep what a search has done, and what it found."""
