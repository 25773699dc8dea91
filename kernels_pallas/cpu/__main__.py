"""`python -m kernels_pallas.cpu` builds the library ahead of its first use, and says why if not."""

import logging

from kernels_pallas import cpu
from kernels_pallas.cpu import build

logging.basicConfig(level=logging.INFO, format="%(message)s")
by = ", products by AMX" if cpu.has_tiles() else ""
print(f"native CPU kernels: {build.library() or 'not available'}{by}")
