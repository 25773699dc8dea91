"""The two ops of attention over pages: `page_write` and `page_attention`. Importing them imports
Pallas."""

from kernels_pallas.op import Body, Op
from kernels_pallas.paged_attention import (
    attention_cases,
    checking,
    mosaic_gpu,
    mosaic_gpu_writing,
    mosaic_tpu,
    mosaic_tpu_writing,
    reference,
    writing_cases,
)
from kernels_pallas.target import not_hopper

page_write = Op(
    "page_write",
    reference.page_write,
    {
        "mosaic_tpu": Body("tpu", mosaic_tpu_writing.page_write, mosaic_tpu_writing.TpuTile),
        "mosaic_gpu": Body(
            "gpu", mosaic_gpu_writing.page_write, mosaic_gpu_writing.GpuTile, declines=not_hopper
        ),
    },
    writing_cases.CASES,
    in_place=((0, 0), (1, 1)),
    check=checking.check_write,
)

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
    attention_cases.CASES,
    check=checking.check_attention,
)
