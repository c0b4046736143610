// AVX2: weights to scales, codes and shifts.
#include "avx2.h"

#if defined(__AVX2__)

#include "weights.h"

namespace halfbyte {

void avx2_search(const ScaleSearch& search, uint8_t* work) { search_rows<8>(search, work); }
Energy avx2_round(const WeightRounding& rounding, uint8_t* work) { return round_rows<8>(rounding, work); }

}  // namespace halfbyte

#endif
