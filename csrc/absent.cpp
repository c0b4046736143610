#include "dispatch.h"
namespace halfbyte {
const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx_vnni_kernels() { return nullptr; }
const Kernels* amx_kernels() { return nullptr; }
double avx2_rounds(int64_t) { return 0; }
double avx_vnni_rounds(int64_t) { return 0; }
double amx_rounds(int64_t) { return 0; }
}  // namespace halfbyte
