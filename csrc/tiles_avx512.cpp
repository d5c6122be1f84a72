#include "tiles.h"

MOEKIT_TILES(avx512)
