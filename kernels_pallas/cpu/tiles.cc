// What Python asks of tiles: kernels_pallas.cpu.has_tiles.

#include "tiles.h"

extern "C" bool jaxserve_have_tiles() { return jaxserve::have_tiles(); }
