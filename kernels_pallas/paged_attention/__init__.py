"""Ragged paged attention: prompt chunks and decode rows of many sequences in one call.

`paged_attention` first writes the step's keys and values into their pages and then attends, so
that sequences which share a page written in this very step see it. The ops `page_write` and
`page_attention` are its two halves.
"""

from kernels_pallas.op import Body, Op, with_reference_gradient
from kernels_pallas.paged_attention import gathered, mosaic_gpu, mosaic_tpu, reference
from kernels_pallas.paged_attention.cases import CASES
from kernels_pallas.paged_attention.ragged import Ragged
from kernels_pallas.paged_attention.writing import page_write

paged_attention = with_reference_gradient(reference.paged_attention, gathered.paged_attention)

page_attention = Op(
    "page_attention",
    reference.page_attention,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu.page_attention, mosaic_tpu.TpuTile),
        "mosaic_gpu": Body("gpu", mosaic_gpu.page_attention, mosaic_gpu.GpuTile),
    },
    CASES,
)

__all__ = ["Ragged", "page_attention", "page_write", "paged_attention"]
