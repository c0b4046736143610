// AVX2: softmax between attention's products.
#include "avx2.h"

#if defined(__AVX2__)

#include "softmax.h"

namespace halfbyte {

void avx2_soften(const Softening& softening) { Softmax<8>::soften(softening); }
void avx2_gather(const Gathering& gathering) { Softmax<8>::gather(gathering); }

}  // namespace halfbyte

#endif
