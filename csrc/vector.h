// Vectors of fp32 in the instructions that the file including this is compiled for.
//
// Each kernel file is compiled once per instruction set, with HFPRUNE_ISA, the name of a namespace,
// and HFPRUNE_WIDTH, the floats of a vector. All that is compiled so must be in that namespace: the
// linker merges inline functions of one name, and would keep one that not every CPU can run. For
// the same reason nothing here calls templates of the standard library.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "kernels.h"

namespace hfprune::HFPRUNE_ISA {

constexpr std::size_t kWidth = HFPRUNE_WIDTH;

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kWidth)));

struct Float32 {
  float value;
};
struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline Floats all(float value) { return Floats{} + value; }
inline Words bits_of(Floats x) { return reinterpret_cast<Words>(x); }
inline Floats floats_of(Words bits) { return reinterpret_cast<Floats>(bits); }

// NaN where b is NaN.
inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }
inline Floats smaller(Floats a, Floats b) { return a < b ? a : b; }
inline Floats magnitude(Floats x) { return floats_of(bits_of(x) & 0x7FFFFFFFu); }

template <typename Vector>
inline Vector load_bits(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats load(const Float32* from) { return load_bits<Floats>(from); }

inline Floats load(const BFloat16* from) {
  return floats_of(__builtin_convertvector(load_bits<Halves>(from), Words) << 16);
}

inline Floats load(const Float16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(load_bits<__m256i>(from)));
#elif defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(load_bits<__m128i>(from)));
#else
  const Words half = __builtin_convertvector(load_bits<Halves>(from), Words);
  // The exponent's bias is corrected by a product, which is right for subnormals too.
  const Floats finite = floats_of((half & 0x7FFFu) << 13) * 0x1p112f;
  const Words special = ((half & 0x7C00u) == 0x7C00u) & (Words{} + 0x7F800000u);
  return floats_of(bits_of(finite) | special | (half & 0x8000u) << 16);
#endif
}

inline void store(Float32* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Rounds to nearest, ties to even, as torch does.
inline void store(BFloat16* to, Floats x) {
  const Words bits = bits_of(x);
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Halves narrow = __builtin_convertvector(x != x ? Words{} + 0x7FC0u : rounded, Halves);
  std::memcpy(to, &narrow, sizeof narrow);
}

inline void store(Float16* to, Floats x) {
#if defined(__AVX512F__)
  const __m256i narrow = _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const __m128i narrow = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
#else
  const Words bits = bits_of(magnitude(x));
  const Words normal = (bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1u)) >> 13;
  // A sum with 1/2 leaves a subnormal's bits, rounded, at the end of the fraction.
  const Words subnormal = bits_of(magnitude(x) + 0.5f) - 0x3F000000u;
  Words half = bits < 0x38800000u ? subnormal : normal;
  half = bits >= 0x47800000u ? Words{} + 0x7C00u : half;
  half = bits > 0x7F800000u ? Words{} + 0x7E00u : half;
  half |= (bits_of(x) >> 16) & 0x8000u;
  const Halves narrow = __builtin_convertvector(half, Halves);
#endif
  std::memcpy(to, &narrow, sizeof narrow);
}

// The first `count` < kWidth items; the other lanes are `rest`.
template <typename T>
inline Floats load_part(const T* from, std::size_t count, float rest) {
  T items[kWidth] = {};
  std::memcpy(items, from, count * sizeof(T));
  float values[kWidth];
  store(reinterpret_cast<Float32*>(values), load(items));
  for (std::size_t i = count; i < kWidth; ++i) values[i] = rest;
  return load(reinterpret_cast<const Float32*>(values));
}

template <typename T>
inline void store_part(T* to, Floats x, std::size_t count) {
  T items[kWidth];
  store(items, x);
  std::memcpy(to, items, count * sizeof(T));
}

// The lanes added, or their maximum, in a fixed order.
inline float sum_of(Floats x) {
  for (std::size_t half = kWidth / 2; half > 0; half /= 2) {
    for (std::size_t i = 0; i < half; ++i) x[i] += x[i + half];
  }
  return x[0];
}

inline float maximum_of(Floats x) {
  float maximum = x[0];
  for (std::size_t i = 1; i < kWidth; ++i) maximum = x[i] > maximum ? x[i] : maximum;
  return maximum;
}

// exp(kLeast) rounds to 0.
constexpr float kLeast = -104.5f;

// exp(x) to 2 ulp for kLeast <= x <= 88, also where it is subnormal; exp(0) is 1.
inline Floats exp_in_range(Floats x) {
  // x = n ln 2 + r. n + 64 is the last bits of a number whose unit is 1.
  constexpr float shift = 0x1.8p23f + 64;
  const Floats shifted = x * 1.44269504f + shift;
  const Floats n = shifted - shift;
  const Floats r = (x - n * 0.693359375f) + n * 2.12194440e-4f;  // ln 2 in two parts
  // The polynomial of least relative error for |r| <= ln 2 / 2 (2e-9).
  Floats y = r * 0.0013843607f + 0.0083741955f;
  y = y * r + 0.041668005f;
  y = y * r + 0.1666643f;
  y = y * r + 0.49999994f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  // Of n < -126 the product alone, which rounds once, makes a subnormal.
  return floats_of(bits_of(y) + (bits_of(shifted) << 23)) * 0x1p-64f;
}

// exp(x) for x <= 88, NaN included; 0 below kLeast.
inline Floats exp(Floats x) { return exp_in_range(larger(all(kLeast), x)); }

// tanh(x) to a few ulp; near 0, where 1 - exp(-2x) cancels, by its series.
inline Floats tanh(Floats x) {
  const Floats e = exp(-2.0f * magnitude(x));
  const Floats far = (1.0f - e) / (1.0f + e);
  const Floats square = x * x;
  Floats near = square * (62.0f / 2835) - 17.0f / 315;
  near = near * square + 2.0f / 15;
  near = near * square - 1.0f / 3;
  near = x + x * (near * square);
  const Floats signed_far = floats_of(bits_of(far) | (bits_of(x) & 0x80000000u));
  return magnitude(x) < 0.25f ? near : signed_far;
}

}  // namespace hfprune::HFPRUNE_ISA
