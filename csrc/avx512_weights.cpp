// AVX-512: weights to scales, codes and shifts.
#include "avx512.h"

#if defined(__AVX512VNNI__)

#include "weights.h"

namespace halfbyte {

void avx512_search(const ScaleSearch& search, uint8_t* work) { search_rows<16>(search, work); }
Energy avx512_round(const WeightRounding& rounding, uint8_t* work) { return round_rows<16>(rounding, work); }

}  // namespace halfbyte

#endif
