"""Controllers: policies that `reasoning.pool` and `reasoning.search` carry out."""
