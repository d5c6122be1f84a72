#include "panel_rows.h"
#include "tiles.h"

MOEKIT_TILES(avx2)
MOEKIT_PANELS(avx2)
