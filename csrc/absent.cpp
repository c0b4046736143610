#include "dispatch.h"
namespace halfbyte {
const Kernels* amx_kernels() { return nullptr; }
double amx_rounds(int64_t) { return 0; }
}  // namespace halfbyte
