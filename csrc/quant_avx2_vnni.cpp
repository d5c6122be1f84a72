#include "quant_tiles.h"

MOEKIT_QUANT_TILES(avx2_vnni)
