// The KL divergence of each row of logits from a teacher's, and its gradient; compiled once per
// instruction set.
//
// A first pass keeps the running maximum m and, in each lane of a vector, s = sum exp(z - m) of
// both rows, times 2^24; a second one, backwards, makes the value and the gradient.

#include "tile.h"

namespace hfprune::HFPRUNE_ISA {
namespace {

// A row's maximum (0 where all is masked) and sum of exp, while it is read tile by tile.
class Normaliser {
 public:
  void add(const Tile& tile, float maximum) {
    if (maximum > m_) {
      s_ = exp(all(m_ - maximum)) * s_;
      m_ = maximum;
    }
    const float base = m_ == kMasked ? 0 : m_;
    Floats sum{};
    for (std::size_t i = 0; i < tile.vectors_end(); i += kWidth) {
      sum += exp_scaled(bounded(tile.at(i) - base));
    }
    s_ += sum;
  }

  // NaN is not masked.
  bool masked() const { return m_ == kMasked && sum_of(s_) == 0; }
  float base() const { return m_ == kMasked ? 0 : m_; }
  float sum() const { return masked() ? 1 : sum_of(s_) * kExpUnit; }

 private:
  float m_ = kMasked;
  Floats s_{};
};

const void* row_of(const Rows& rows, std::size_t index) {
  return element(static_cast<const void*>(rows.data),
                 static_cast<std::ptrdiff_t>(index) * rows.stride, rows.type);
}

class Pair {
 public:
  Pair(const KlPass& pass, std::size_t index)
      : pass_(pass),
        index_(index),
        z_row_(row_of(pass.logits, index)),
        y_row_(row_of(pass.teacher, index)),
        grad_row_(element(pass.grad.data, static_cast<std::ptrdiff_t>(index) * pass.grad.stride,
                          pass.grad.type)) {}

  void run(Tile& z_tile, Tile& y_tile) {
    Normaliser z_sums, y_sums;
    for (std::size_t first = 0; first < pass_.columns; first += kTile) {
      const float z_maximum = load_z(first, z_tile);
      z_sums.add(z_tile, z_maximum);
      const float y_maximum = load_y(first, y_tile);
      y_sums.add(y_tile, y_maximum);
    }
    const bool no_teacher = y_sums.masked();
    const bool no_gradient = no_teacher || pass_.row_scale[index_] == 0;
    const float factor = pass_.transform.scale * pass_.row_scale[index_];
    const float z_base = z_sums.base(), y_base = y_sums.base();
    const float z_inverse = 1 / z_sums.sum(), y_inverse = 1 / y_sums.sum();
    const float log_ratio_of_sums = __builtin_logf(z_sums.sum() / y_sums.sum());
    Floats value{};
    for (std::size_t t = (pass_.columns + kTile - 1) / kTile; t-- > 0;) {
      load_z(t * kTile, z_tile);
      load_y(t * kTile, y_tile);
      Floats tile_value{};
      const float* y = y_tile.z;
      const auto gradient = [=, &tile_value](std::size_t i, Floats z) {
        const Floats z_d = z - z_base;
        const Floats y_d = load(y + i) - y_base;
        const Floats p = exp(y_d) * y_inverse;
        const Floats difference = exp(z_d) * z_inverse - p;
        const Floats log_ratio = (y_d - z_d) + log_ratio_of_sums;
        // An entry of p = 0 adds nothing, also where -inf - -inf makes its ratio NaN.
        tile_value += (p == 0.0f ? difference : fma(p, log_ratio, difference));
        return no_gradient ? Floats{} : difference * factor;
      };
      store_gradient(z_tile, pass_.transform.softcap, pass_.grad, grad_row_, t * kTile, false,
                     gradient);
      value += tile_value;
    }
    pass_.values[index_] = no_teacher ? 0 : sum_of(value);
    // Also where the slope of the transform is NaN.
    if (no_gradient) store_zeros(pass_.grad, grad_row_, pass_.columns);
  }

 private:
  float load_z(std::size_t first, Tile& tile) const {
    return load_tile(z_row_, pass_.logits.type, first, pass_.columns, pass_.transform, tile);
  }
  float load_y(std::size_t first, Tile& tile) const {
    return load_tile(y_row_, pass_.teacher.type, first, pass_.columns, pass_.teacher_transform,
                     tile);
  }

  const KlPass& pass_;
  std::size_t index_;
  const void *z_row_, *y_row_;
  void* grad_row_;
};

}  // namespace

void kl_pass(const KlPass& pass, std::size_t first, std::size_t end) {
  Tile z_tile, y_tile;
  for (std::size_t index = first; index < end; ++index) Pair(pass, index).run(z_tile, y_tile);
}

}  // namespace hfprune::HFPRUNE_ISA
