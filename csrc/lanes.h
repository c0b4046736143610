// The compiler's own vectors. In an unnamed namespace, as all that uses them: each instruction set compiles its own.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX__)
#include <immintrin.h>
#endif

namespace halfbyte {
namespace {

// Vectors of 4, 8 and 16 lanes (gcc does not keep a vector's size where it depends on a template argument).
template <int W>
struct Lanes;
template <>
struct Lanes<4> {
  typedef float Floats __attribute__((vector_size(16)));
  typedef int32_t Ints __attribute__((vector_size(16)));
  typedef double Doubles __attribute__((vector_size(32)));
  typedef uint32_t Words __attribute__((vector_size(16)));
  typedef uint16_t Halves __attribute__((vector_size(8)));
};
template <>
struct Lanes<8> {
  typedef float Floats __attribute__((vector_size(32)));
  typedef int32_t Ints __attribute__((vector_size(32)));
  typedef double Doubles __attribute__((vector_size(64)));
  typedef uint32_t Words __attribute__((vector_size(32)));
  typedef uint16_t Halves __attribute__((vector_size(16)));
};
template <>
struct Lanes<16> {
  typedef float Floats __attribute__((vector_size(64)));
  typedef int32_t Ints __attribute__((vector_size(64)));
  typedef double Doubles __attribute__((vector_size(128)));
  typedef uint32_t Words __attribute__((vector_size(64)));
  typedef uint16_t Halves __attribute__((vector_size(32)));
};

// The larger and the smaller of each lane; b where a is no number.
template <typename V>
static inline V larger(V a, V b) {
#if defined(__AVX512F__)  // gcc sees two instructions in what is one
  if constexpr (sizeof(V) == 64) return (V)_mm512_max_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_max_ps((__m256)a, (__m256)b);
#endif
  return a > b ? a : b;
}

template <typename V>
static inline V smaller(V a, V b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(V) == 64) return (V)_mm512_min_ps((__m512)a, (__m512)b);
#endif
#if defined(__AVX__)
  if constexpr (sizeof(V) == 32) return (V)_mm256_min_ps((__m256)a, (__m256)b);
#endif
  return a < b ? a : b;
}

template <typename V, typename T>
static inline V load_lanes(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

}  // namespace
}  // namespace halfbyte
