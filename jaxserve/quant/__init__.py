"""Eight-bit weights: which of them, and how they are rounded."""
