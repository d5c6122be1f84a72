#include "tiles.h"

MOEKIT_TILES(avx2)
