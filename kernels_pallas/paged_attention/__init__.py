"""Ragged paged attention: prompt chunks and decode rows of many sequences in one call.

Every implementation first writes the step's keys and values into their pages and then attends, so
that sequences which share a page written in this very step see it.
"""

from kernels_pallas.paged_attention.reference import Ragged, paged_attention

__all__ = ["Ragged", "paged_attention"]
