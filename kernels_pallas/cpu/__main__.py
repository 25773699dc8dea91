"""`python -m kernels_pallas.cpu` builds the library ahead of its first use, and says why if not."""

import logging

from kernels_pallas.cpu import build

logging.basicConfig(level=logging.INFO, format="%(message)s")
print(f"native CPU kernels: {build.library() or 'not available'}")
