"""Search over continuations: controllers that turn events into actions.

A controller keeps a pool of paths (partial answers), looks at what the engine reports about them,
and answers with actions: fork a path, prune it, append to it, stop. It never calls the engine and
never sees an array; its state is passed in and returned, so a search replays from its events.

Here will live the pool and its bookkeeping, scores and budgets, and the controllers themselves:
best-of-n, beam search, tree of thought, expand-and-reduce, speculation, voting. Nothing here
imports more of jaxserve than `jaxserve.protocol`, and nothing here imports JAX.
"""
