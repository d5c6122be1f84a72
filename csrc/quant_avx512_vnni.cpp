#include "quant_tiles.h"

MOEKIT_QUANT_TILES(avx512_vnni)
