#include "tiles.h"

MOEKIT_TILES(portable)
