"""The two halves of attention over pages, as ops with kernels. Importing them imports Pallas."""

from kernels_pallas.op import Body, Op
from kernels_pallas.paged_attention import mosaic_gpu, mosaic_tpu, reference
from kernels_pallas.paged_attention.cases import CASES
from kernels_pallas.paged_attention.coded_cases import ATTENTION
from kernels_pallas.paged_attention.writing import page_write
from kernels_pallas.target import not_hopper

page_attention = Op(
    "page_attention",
    reference.page_attention,
    {
        "mosaic_tpu": Body(
            "tpu", mosaic_tpu.page_attention, mosaic_tpu.TpuTile, mosaic_tpu.TpuTile.wanted
        ),
        "mosaic_gpu": Body(
            "gpu", mosaic_gpu.page_attention, mosaic_gpu.GpuTile, declines=not_hopper
        ),
    },
    (*CASES, *ATTENTION),
)

__all__ = ["page_attention", "page_write"]
