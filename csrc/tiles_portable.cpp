#include "panel_rows.h"
#include "tiles.h"

MOEKIT_TILES(portable)
MOEKIT_PANELS(portable)
