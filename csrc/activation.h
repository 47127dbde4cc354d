// The activation functions of gated MLPs with their derivatives, as in kernels/_activations.py.
#pragma once

#include "vector.h"

namespace hfprune::HFPRUNE_ISA {

struct ValueAndSlope {
  Floats value, slope;
};

// value = z s and slope = s + z s (1 - s) inner of s = sigmoid(x), where inner is dx/dz.
inline ValueAndSlope by_sigmoid(Floats z, Floats x, Floats inner) {
  const Floats e = exp(-magnitude(x));
  const Floats near = 1.0f / (1.0f + e), far = e * near;
  const Floats s = x < 0.0f ? far : near;
  const Floats rest = x < 0.0f ? near : far;  // 1 - s, which does not cancel
  const Floats value = z * s;
  return {value, s + value * rest * inner};
}

template <Activation activation>
inline ValueAndSlope value_and_slope(Floats z) {
  if constexpr (activation == Activation::silu) {
    return by_sigmoid(z, z, all(1));
  } else if constexpr (activation == Activation::gelu_tanh) {
    // 2 sqrt(2 / pi) and 0.044715 times that. Beyond the bound the sigmoid is 0 or 1, and without
    // it the slope would be 0 times inf.
    const Floats square = smaller(all(1e8f), z * z);
    return by_sigmoid(z, z * (1.59576912f + 0.0713548163f * square),
                      1.59576912f + 0.214064449f * square);
  } else {
    // The tail of the normal distribution: exp(-z^2 / 2) times a polynomial in t, for |z| <= 14.5
    // that of least relative error (4e-8); beyond, exp is 0.
    const Floats density = exp(-0.5f * z * z);
    const Floats t = 1.0f / (1.0f + 0.27f * magnitude(z));
    Floats y = t * 0.028961118f - 0.12648596f;
    y = y * t + 0.16978642f;
    y = y * t - 0.069211125f;
    y = y * t + 0.10782592f;
    y = y * t + 0.07204947f;
    y = y * t + 0.10181065f;
    y = y * t + 0.107542865f;
    y = y * t + 0.10772066f;
    const Floats tail = y * t * density;
    const Floats cdf = z < 0.0f ? tail : 1.0f - tail;
    return {z * cdf, cdf + z * density * 0.39894228f};
  }
}

}  // namespace hfprune::HFPRUNE_ISA
