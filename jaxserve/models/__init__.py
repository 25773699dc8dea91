"""Model families: each is pure functions over a tree of weights."""
