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
#if defined(__F16C__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "kernels.h"

namespace hfprune::HFPRUNE_ISA {

constexpr std::size_t kWidth = HFPRUNE_WIDTH;

typedef float Floats __attribute__((vector_size(4 * kWidth)));
typedef std::int32_t Ints __attribute__((vector_size(4 * kWidth)));
typedef std::uint32_t Words __attribute__((vector_size(4 * kWidth)));
typedef std::uint16_t Halves __attribute__((vector_size(2 * kWidth)));

struct BFloat16 {
  std::uint16_t bits;
};
struct Float16 {
  std::uint16_t bits;
};

inline Floats all(float value) { return Floats{} + value; }
inline Words bits_of(Floats x) { return reinterpret_cast<Words>(x); }
inline Floats floats_of(Words bits) { return reinterpret_cast<Floats>(bits); }

// a b + c, rounded once where the instructions can.
inline Floats fma(Floats a, Floats b, Floats c) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_fmadd_ps(
      reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b), reinterpret_cast<__m512>(c)));
#elif defined(__FMA__)
  return reinterpret_cast<Floats>(_mm256_fmadd_ps(
      reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b), reinterpret_cast<__m256>(c)));
#elif defined(__aarch64__)
  return reinterpret_cast<Floats>(vfmaq_f32(reinterpret_cast<float32x4_t>(c),
                                            reinterpret_cast<float32x4_t>(a),
                                            reinterpret_cast<float32x4_t>(b)));
#else
  return a * b + c;
#endif
}

inline Floats fma(Floats a, Floats b, float c) { return fma(a, b, all(c)); }
inline Floats fma(Floats a, float b, Floats c) { return fma(a, all(b), c); }
inline Floats fma(Floats a, float b, float c) { return fma(a, all(b), all(c)); }

// NaN where b is NaN, and b where a is.
inline Floats larger(Floats a, Floats b) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(
      _mm512_max_ps(reinterpret_cast<__m512>(a), reinterpret_cast<__m512>(b)));
#elif defined(__AVX2__)
  return reinterpret_cast<Floats>(
      _mm256_max_ps(reinterpret_cast<__m256>(a), reinterpret_cast<__m256>(b)));
#else
  return a > b ? a : b;
#endif
}
inline Floats magnitude(Floats x) { return floats_of(bits_of(x) & 0x7FFFFFFFu); }
inline Floats minus_magnitude(Floats x) { return floats_of(bits_of(x) | 0x80000000u); }
// By the sign bit, which chooses without a comparison.
inline Floats if_negative(Floats x, Floats then, Floats otherwise) {
  return reinterpret_cast<Ints>(x) < 0 ? then : otherwise;
}

template <typename Vector>
inline Vector load_bits(const void* from) {
  Vector vector;
  std::memcpy(&vector, from, sizeof vector);
  return vector;
}

inline Floats load(const float* from) { return load_bits<Floats>(from); }

// Halves as words, and the low halves of words below 2^16; the compiler's own take twice as many
// instructions.
inline Words widen(Halves halves) {
#if defined(__AVX512F__)
  return reinterpret_cast<Words>(_mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(halves)));
#elif defined(__AVX2__)
  return reinterpret_cast<Words>(_mm256_cvtepu16_epi32(reinterpret_cast<__m128i>(halves)));
#else
  return __builtin_convertvector(halves, Words);
#endif
}

inline Halves narrow(Words words) {
#if defined(__AVX512F__)
  return reinterpret_cast<Halves>(_mm512_cvtepi32_epi16(reinterpret_cast<__m512i>(words)));
#elif defined(__AVX2__)
  const __m256i packed = _mm256_packus_epi32(reinterpret_cast<__m256i>(words), __m256i{});
  return reinterpret_cast<Halves>(_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0xD8)));
#else
  return __builtin_convertvector(words, Halves);
#endif
}

inline Floats load(const BFloat16* from) { return floats_of(widen(load_bits<Halves>(from)) << 16); }

inline Floats load(const Float16* from) {
#if defined(__AVX512F__)
  return reinterpret_cast<Floats>(_mm512_cvtph_ps(load_bits<__m256i>(from)));
#elif defined(__F16C__)
  return reinterpret_cast<Floats>(_mm256_cvtph_ps(load_bits<__m128i>(from)));
#else
  const Words half = widen(load_bits<Halves>(from));
  // The exponent's bias is corrected by a product, which is right for subnormals too.
  const Floats finite = floats_of((half & 0x7FFFu) << 13) * 0x1p112f;
  const Words special = (half & 0x7C00u) == 0x7C00u ? Words{} + 0x7F800000u : Words{};
  return floats_of(bits_of(finite) | special | (half & 0x8000u) << 16);
#endif
}

inline void store(float* to, Floats x) { std::memcpy(to, &x, sizeof x); }

// Rounds to nearest, ties to even, as torch does.
inline void store(BFloat16* to, Floats x) {
  const Words bits = bits_of(x);
  const Words rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  const Halves result = narrow(x != x ? Words{} + 0x7FC0u : rounded);
  std::memcpy(to, &result, sizeof result);
}

inline void store(Float16* to, Floats x) {
#if defined(__AVX512F__)
  const __m256i result = _mm512_cvtps_ph(reinterpret_cast<__m512>(x), _MM_FROUND_TO_NEAREST_INT);
#elif defined(__F16C__)
  const __m128i result = _mm256_cvtps_ph(reinterpret_cast<__m256>(x), _MM_FROUND_TO_NEAREST_INT);
#else
  const Words bits = bits_of(magnitude(x));
  const Words normal = (bits - 0x38000000u + 0xFFFu + ((bits >> 13) & 1u)) >> 13;
  // A sum with 1/2 leaves a subnormal's bits, rounded, at the end of the fraction.
  const Words subnormal = bits_of(magnitude(x) + 0.5f) - 0x3F000000u;
  Words half = bits < 0x38800000u ? subnormal : normal;
  half = bits >= 0x47800000u ? Words{} + 0x7C00u : half;
  half = bits > 0x7F800000u ? Words{} + 0x7E00u : half;
  half |= (bits_of(x) >> 16) & 0x8000u;
  const Halves result = narrow(half);
#endif
  std::memcpy(to, &result, sizeof result);
}

// The first `count` < kWidth items; the other lanes are `rest`.
template <typename T>
inline Floats load_part(const T* from, std::size_t count, float rest) {
  T items[kWidth] = {};
  std::memcpy(items, from, count * sizeof(T));
  float values[kWidth];
  store(values, load(items));
  for (std::size_t i = count; i < kWidth; ++i) values[i] = rest;
  return load(values);
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

// Where exp(x) rounds to 0, and what takes exp_scaled there.
constexpr float kLeast = -104.5f;
inline Floats bounded(Floats x) { return larger(all(kLeast), x); }  // NaN stays

// What exp_scaled(x) has to be multiplied by for exp(x).
constexpr float kExpUnit = 0x1p-24f;

// 2^24 exp(x) to 2 ulp for kLeast <= x <= 0, none of which is subnormal: exactly 0 at kLeast, and
// exactly 2^24 at 0.
inline Floats exp_scaled(Floats x) {
  // x = n ln 2 + r. The last bits of `shifted`, whose unit is 1, are n + 151: the exponent of
  // 2^(n + 24), and of 0 for n = -151.
  constexpr float shift = 0x1.8p23f + 151;
  const Floats shifted = fma(x, 1.44269504f, shift);
  const Floats n = shifted - shift;
  const Floats r = fma(n, 2.12194440e-4f, fma(n, -0.693359375f, x));  // ln 2 in two parts
  // The polynomial of least relative error for |r| <= ln 2 / 2 (2e-9).
  const Floats square = r * r;
  Floats y = fma(square, 0.0013843607f, fma(r, 0.0083741955f, 0.041668005f));
  y = fma(square, y, fma(r, 0.1666643f, 0.49999994f));
  y = fma(square, y, r) + 1.0f;
  return y * floats_of(bits_of(shifted) << 23);
}

// exp(x) to 2 ulp for x <= 0 and NaN, also where it is subnormal.
inline Floats exp(Floats x) { return exp_scaled(bounded(x)) * kExpUnit; }

// tanh(x) to a few ulp; near 0, where 1 - exp(-2x) cancels, by its series.
inline Floats tanh(Floats x) {
  const Floats e = exp(2.0f * minus_magnitude(x));
  const Floats far = (1.0f - e) / (1.0f + e);
  const Floats square = x * x;
  Floats near = fma(square, 62.0f / 2835, -17.0f / 315);
  near = fma(near, square, 2.0f / 15);
  near = fma(near, square, -1.0f / 3);
  near = fma(x, near * square, x);
  const Floats signed_far = floats_of(bits_of(far) | (bits_of(x) & 0x80000000u));
  return magnitude(x) < 0.25f ? near : signed_far;
}

}  // namespace hfprune::HFPRUNE_ISA
