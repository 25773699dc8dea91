"""Ragged paged attention: prompt chunks and decode rows of many sequences in one call.

`paged_attention` first writes the step's keys and values into their pages and then attends, so
that sequences which share a page written in this very step see it. Its two halves are the ops
`page_write` and `page_attention` in ops.py.
"""

from kernels_pallas.op import with_reference_gradient
from kernels_pallas.paged_attention import gathered, reference
from kernels_pallas.paged_attention.merging import merge
from kernels_pallas.paged_attention.ragged import SHARED_KEYS, Groups, Ragged

paged_attention = with_reference_gradient(reference.paged_attention, gathered.paged_attention)

__all__ = ["SHARED_KEYS", "Groups", "Ragged", "merge", "paged_attention"]
