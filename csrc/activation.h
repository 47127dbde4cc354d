// The activation functions of gated MLPs with their derivatives, as in kernels/_activations.py.
#pragma once

#include "vector.h"

namespace hfprune::HFPRUNE_ISA {

struct ValueAndSlope {
  Floats value, slope;
};

// value = z s and slope = s + z s (1 - s) inner of s = sigmoid(x), where inner is dx/dz.
inline ValueAndSlope by_sigmoid(Floats z, Floats x, Floats inner) {
  const Floats e = exp(minus_magnitude(x));
  const Floats near = 1.0f / (1.0f + e), far = e * near;
  const Floats s = if_negative(x, far, near);
  const Floats rest = if_negative(x, near, far);  // 1 - s, which does not cancel
  const Floats value = z * s;
  return {value, fma(value * rest, inner, s)};
}

template <Activation activation>
inline ValueAndSlope value_and_slope(Floats z) {
  if constexpr (activation == Activation::silu) {
    return by_sigmoid(z, z, all(1));
  } else if constexpr (activation == Activation::gelu_tanh) {
    // 2 sqrt(2 / pi) and 0.044715 times that. Beyond the bound the sigmoid is 0 or 1, and without
    // it the slope would be 0 times inf.
    const Floats square = z * z > 1e8f ? all(1e8f) : z * z;
    return by_sigmoid(z, z * fma(square, 0.0713548163f, 1.59576912f),
                      fma(square, 0.214064449f, 1.59576912f));
  } else {
    // The tail of the normal distribution: exp(-z^2 / 2) times a polynomial in t, for |z| <= 14.5
    // that of least relative error (4e-8), whose fp32 sum at t = 1 is 1/2; beyond, exp is 0.
    const Floats density = exp(-0.5f * z * z);
    const Floats t = 1.0f / fma(magnitude(z), 0.27f, 1.0f);
    Floats y = fma(t, 0.028961118f, -0.12648596f);
    y = fma(y, t, 0.16978641f);
    y = fma(y, t, -0.069211125f);
    y = fma(y, t, 0.10782592f);
    y = fma(y, t, 0.07204947f);
    y = fma(y, t, 0.10181065f);
    y = fma(y, t, 0.107542865f);
    y = fma(y, t, 0.10772066f);
    const Floats tail = y * t * density;
    const Floats cdf = if_negative(z, tail, 1.0f - tail);
    return {z * cdf, fma(z * density, 0.39894228f, cdf)};
  }
}

}  // namespace hfprune::HFPRUNE_ISA
