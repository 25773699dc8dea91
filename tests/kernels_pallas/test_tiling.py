"""Arithmetic of tiles."""

from kernels_pallas.tiling import divisor


def test_divisor():
    assert divisor(14336, 4096, 128) == 3584
    assert divisor(7168, 4096, 128) == 3584
    assert divisor(384, 128, 128) == 128
    assert divisor(128, 4096, 128) == 128
