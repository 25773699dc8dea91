"""Paths of searches on the engine: they fork for nothing, rest on their pages and die in one step.

`keeper` is the engine's side, on its thread; `pool` is the side of a search, on an event loop.
"""
