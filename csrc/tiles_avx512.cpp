#include "panel_rows.h"
#include "tiles.h"

MOEKIT_TILES(avx512)
MOEKIT_PANELS(avx512)
