"""Constants of a softmax that is computed in base 2, for which hardware has an instruction."""

from __future__ import annotations

import math

LOG2E = math.log2(math.e)
"""Takes a logit to base 2: exp(x) = exp2(x * LOG2E)."""

INITIAL_MAX = -1e30
"""The maximum before any logit. It is finite, so that hidden logits, which are -inf, weigh 0 and
not NaN where nothing else has been seen."""
