// The compiler's own vectors. In an unnamed namespace, as all that uses them: each instruction set compiles its own.
#pragma once

#include <cstdint>
#include <cstring>

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

template <typename V, typename T>
static inline V load_lanes(const T* from) {
  V v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

}  // namespace
}  // namespace halfbyte
