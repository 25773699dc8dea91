"""Four-bit blocks against their definition, and against transformers."""

import ml_dtypes
import numpy as np
import pytest

from jaxserve.checkpoint.mxfp4 import dequantize, read
from jaxserve.errors import CheckpointError


def by_definition(blocks, scales):
    """e2m1: sign, two exponent bits of bias 1, one mantissa bit; exponent 0 is subnormal."""
    out = np.zeros((*scales.shape, 32))
    for index in np.ndindex(*scales.shape):
        for i in range(32):
            bits = int(blocks[index][i // 2]) >> (4 * (i % 2)) & 15
            sign, exponent, mantissa = bits >> 3, bits >> 1 & 3, bits & 1
            size = mantissa / 2 if exponent == 0 else (1 + mantissa / 2) * 2.0 ** (exponent - 1)
            out[index][i] = (-1) ** sign * size * 2.0 ** (int(scales[index]) - 127)
    return out.reshape(*scales.shape[:-1], -1)


def draw(*shape, seed=0, low=100, high=140):
    rng = np.random.default_rng(seed)
    return rng.integers(0, 256, (*shape, 16), np.uint8), rng.integers(low, high, shape, np.uint8)


def test_values_are_the_definitions():
    blocks, scales = draw(3, 4, 2)
    values = dequantize(blocks, scales)
    assert values.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(values.astype(np.float64), by_definition(blocks, scales))


def test_every_nibble_and_the_ends_of_the_exponent():
    blocks = np.arange(256, dtype=np.uint8).reshape(1, 16, 16)
    for scale in (1, 127, 252):
        scales = np.full((1, 16), scale, np.uint8)
        values = dequantize(blocks, scales).astype(np.float64)
        np.testing.assert_array_equal(values, by_definition(blocks, scales))


@pytest.mark.filterwarnings("default")
def test_values_are_transformers():
    torch = pytest.importorskip("torch")
    theirs = pytest.importorskip("transformers.integrations.mxfp4").convert_moe_packed_tensors
    blocks, scales = draw(2, 6, 3, seed=1)
    expected = theirs(torch.from_numpy(blocks), torch.from_numpy(scales), dtype=torch.float32)
    values = dequantize(blocks, scales).astype(np.float32)
    np.testing.assert_array_equal(values.swapaxes(1, 2), expected.numpy())


def test_rows_of_gate_and_up_are_read_apart():
    blocks, scales = draw(2, 6, 3)
    stored = {"w_blocks": blocks, "w_scales": scales}
    whole = dequantize(blocks, scales)
    for rows in (slice(0, None, 2), slice(1, None, 2), slice(None)):
        np.testing.assert_array_equal(read(stored.__getitem__, "w", rows), whole[:, rows])


@pytest.mark.parametrize(
    ("blocks", "scales", "message"),
    [
        (np.zeros((2, 4, 3, 8), np.uint8), np.zeros((2, 4, 3), np.uint8), r"w_blocks is uint8"),
        (np.zeros((2, 4, 3, 16), np.int8), np.zeros((2, 4, 3), np.uint8), r"w_blocks is int8"),
        (np.zeros((2, 4, 3, 16), np.uint8), np.zeros((2, 3, 3), np.uint8), r"\[2, 3, 3, 16\]"),
        (np.zeros((2, 4, 3, 16), np.uint8), np.full((2, 4, 3), 255, np.uint8), "w_scales holds"),
        (
            np.zeros((2, 4, 3, 16), np.uint8),
            np.ones((2, 4, 3), np.float32),
            r"w_scales is float32 \[2",
        ),
    ],
)
def test_what_is_no_mxfp4_is_refused(blocks, scales, message):
    stored = {"w_blocks": blocks, "w_scales": scales}
    with pytest.raises(CheckpointError, match=message):
        read(stored.__getitem__, "w", slice(None))
