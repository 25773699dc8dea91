"""Training: the models that are served, by the same forward pass and over the same tree.

`loss` and `step` are pure, `data` packs documents, `checkpoint` keeps what a run needs to go on,
and `loop` puts them together. Nothing here knows the engine.
"""
