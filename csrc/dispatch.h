// Which tables of kernels there are. A getter returns null where this build has no such instructions.
#pragma once

#include "internal.h"

namespace halfbyte {

extern const Kernels scalar_kernels;
const Kernels* avx2_kernels();
const Kernels* avx_vnni_kernels();
const Kernels* avx512_kernels();
const Kernels* amx_kernels();
const Kernels* neon_kernels();

const Kernels& kernels_of(Isa isa);  // throws where it is not available

void drive_product(const Run& run, const Kernels& kernels, const Problem& problem, const Output& output);

// Multiply-adds of one round of back-to-back dot products, for `integer_limit`; each runs `rounds` of them.
double avx2_rounds(int64_t rounds);
double avx_vnni_rounds(int64_t rounds);
double avx512_rounds(int64_t rounds);
double amx_rounds(int64_t rounds);
double neon_rounds(int64_t rounds);

}  // namespace halfbyte
