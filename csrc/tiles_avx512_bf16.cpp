#include "panel_rows.h"
#include "tiles.h"

MOEKIT_TILES(avx512_bf16)
MOEKIT_PANELS(avx512_bf16)

const moekit::Panels moekit::pairs_avx512_bf16[2] = {moekit::panel_table<float, float>(),
                                                     moekit::panel_table<moekit::BF16, std::uint32_t>()};
