// A value for each row of logits, and its gradient; compiled once per instruction set.
//
// A first pass over the tiles of a row makes its sums (row_sums.h). A second one, backwards as what
// was read last is still in the cache, makes the gradient.

#include "row_sums.h"

namespace hfprune::HFPRUNE_ISA {
namespace {

// fisher's order of summation: logit i is in lane i / kGroup % kLanes. The lanes follow one
// another, and in a lane its logits.
constexpr std::size_t kGroup = 8, kLanes = 512, kPeriod = kGroup * kLanes;
static_assert(kPeriod % kTile == 0, "a tile lies in one period");

// The transformed logit at one place of a row.
float logit_at(const RowPass& pass, const void* row, std::size_t column) {
  Tile one;
  load_tile(row, pass.logits.type, column, column + 1, pass.transform, one);
  return one.z[0];
}

// A row's label: where the gradient of its term is, and whether it counts.
struct Label {
  std::size_t y = 0;
  bool counts = true, wrong = false;
};

Label label_of(const RowPass& pass, std::size_t index) {
  const std::int64_t y = pass.label[index];
  if (y == -100) return {0, false, false};  // torch's ignore_index
  const bool wrong = y < 0 || static_cast<std::size_t>(y) >= pass.columns;
  return {wrong ? 0 : static_cast<std::size_t>(y), true, wrong};
}

class Row {
 public:
  Row(const RowPass& pass, std::size_t index, Tile& tile)
      : pass_(pass),
        tile_(tile),
        index_(index),
        row_(element(static_cast<const void*>(pass.logits.data),
                     static_cast<std::ptrdiff_t>(index) * pass.logits.stride, pass.logits.type)) {}

  void run() {
    if (pass_.criterion == Criterion::entropy) {
      run_entropy();
    } else {
      run_labelled();
    }
  }

 private:
  void run_entropy() {
    Sums sums = finished(entropy_sums(pass_, row_, tile_));
    const float centre = sums.u / sums.s;
    pass_.values[index_] = __builtin_logf(sums.s) - centre;
    if (pass_.grad.data == nullptr) return;
    if (pass_.row_scale[index_] == 0) return write_zeros();
    const float factor = -pass_.transform.scale * pass_.row_scale[index_] / sums.s;
    const float base = sums.base;
    const bool finite = __builtin_isfinite(factor) && __builtin_isfinite(centre);
    each_tile_back(finite, [=](std::size_t, Floats z) {
      const Floats d = bounded(z - base);
      return exp_scaled(d) * factor * fma(d, kExpUnit, -centre * kExpUnit);
    });
  }

  void run_labelled() {
    const bool distils = pass_.criterion == Criterion::self_distillation;
    Label label;
    Sums sums;
    float z_y = 0;
    if (pass_.criterion == Criterion::fisher) {
      sums = draw(label, z_y);
    } else {
      label = label_of(pass_, index_);
      z_y = logit_at(pass_, row_, label.y);
      sums = finished(distils ? distillation_sums(pass_, row_, tile_)
                              : label_sums(pass_, row_, tile_));
      if (label.wrong) sums.s = __builtin_nanf("");
    }
    const float alpha = distils ? pass_.alpha : 0;
    float value = __builtin_logf(sums.s) - (z_y - sums.base);
    if (distils) {
      const float divergence =
          __builtin_logf(sums.s / sums.s_r) + (1 - pass_.temperature) * (sums.u / sums.s_r);
      value = (1 - alpha) * value + alpha * divergence;
    }
    pass_.values[index_] = label.counts ? value : 0;
    if (pass_.grad.data == nullptr) return;
    if (pass_.row_scale[index_] == 0 || !label.counts) return write_zeros();
    write_labelled(sums, label.y, z_y, alpha);
  }

  void write_labelled(const Sums& sums, std::size_t y, float z_y, float alpha) {
    const float factor = pass_.transform.scale * pass_.row_scale[index_] / sums.s;
    const float r_share = alpha == 0 ? 0 : alpha * sums.s / sums.s_r;
    const float sharpness = 1 / pass_.temperature, base = sums.base;
    const bool finite = __builtin_isfinite(factor) && __builtin_isfinite(r_share);
    if (alpha == 0) {
      each_tile_back(finite, [=](std::size_t, Floats z) { return exp(z - base) * factor; });
    } else {
      each_tile_back(finite, [=](std::size_t, Floats z) {
        const Floats d = z - base;
        return (exp(d) - r_share * exp(d * sharpness)) * factor;
      });
    }
    // The entry of the label again, from a tile of one.
    tile_.z[0] = z_y;
    tile_.count = 1;
    for (std::size_t i = 1; i < kWidth; ++i) tile_.z[i] = kMasked;
    const float label_share = (1 - alpha) * sums.s;
    store_gradient(tile_, pass_.transform.softcap, pass_.grad, grad_row(), y, false,
                   [=](std::size_t, Floats z) {
                     const Floats d = z - base;
                     const Floats e = exp(d) - r_share * exp(d * sharpness);
                     return (e - label_share) * factor;
                   });
  }

  template <typename Gradient>
  void each_tile_back(bool finite, const Gradient& gradient) {
    const std::size_t tiles = (pass_.columns + kTile - 1) / kTile;
    for (std::size_t t = tiles; t-- > 0;) {
      // The last one is still there.
      if (t + 1 < tiles || pass_.criterion == Criterion::fisher) {
        load_tile(row_, pass_.logits.type, t * kTile, pass_.columns, pass_.transform, tile_);
      }
      store_gradient(tile_, pass_.transform.softcap, pass_.grad, grad_row(), t * kTile, finite,
                     gradient);
    }
  }

  Sums draw(Label& label, float& z_y);

  // Takes the unit out; a row of -inf has base 0 and s 1; NaN stays.
  static Sums finished(Sums sums) {
    sums.masked = sums.base == kMasked && sums.s == 0;
    if (sums.base == kMasked) sums.base = 0;
    sums.s = sums.masked ? 1 : sums.s * kExpUnit;
    sums.s_r = sums.masked ? 1 : sums.s_r * kExpUnit;
    sums.u *= kExpUnit;
    return sums;
  }

  void* grad_row() const {
    return element(pass_.grad.data, static_cast<std::ptrdiff_t>(index_) * pass_.grad.stride,
                   pass_.grad.type);
  }
  void write_zeros() { store_zeros(pass_.grad, grad_row(), pass_.columns); }

  const RowPass& pass_;
  Tile& tile_;
  std::size_t index_;
  const void* row_;
};

Sums Row::draw(Label& label, float& z_y) {
  // The sum of each place in a period; kGroup of them are a lane.
  alignas(64) float places[kPeriod] = {};
  Floats s{};  // added up as for a given label, so that a drawn one gives the same bits
  Sums sums;
  sums.base = each_tile(
      pass_, row_, tile_,
      [&](float from, float to) {
        const float alpha = Rescaling(from, to).factor;
        s = alpha * s;
        for (std::size_t i = 0; i < kPeriod; i += kWidth)
          store(places + i, alpha * load(places + i));
      },
      [&](float base, std::size_t first) {
        float* const of_tile = places + first % kPeriod;
        Floats tile_s{};
        for (std::size_t i = 0; i < tile_.vectors_end(); i += kWidth) {
          const Floats e = exp_scaled(bounded(tile_.at(i) - base));
          store(of_tile + i, load(of_tile + i) + e);
          tile_s += e;
        }
        s += tile_s;
      });
  float lanes[kLanes];
  for (std::size_t lane = 0; lane < kLanes; ++lane) {
    lanes[lane] = 0;
    for (std::size_t i = 0; i < kGroup; ++i) lanes[lane] += places[lane * kGroup + i];
  }
  sums.s = sum_of(s);
  const float target = pass_.uniform[index_] * sums.s;  // times 2^24, as the lanes are
  sums = finished(sums);
  label.counts = !sums.masked;
  if (sums.masked) return sums;
  float before = 0;
  std::size_t crossing = kLanes, last = 0;
  for (std::size_t lane = 0; lane < kLanes && crossing == kLanes; ++lane) {
    if (lanes[lane] > 0) last = lane;
    if (lanes[lane] > 0 && before + lanes[lane] > target) {
      crossing = lane;
    } else {
      before += lanes[lane];
    }
  }
  const bool hidden = crossing == kLanes;  // by rounding, or NaN
  if (hidden) crossing = last;
  bool found = false;
  float sum = 0;
  for (std::size_t group = crossing * kGroup; group < pass_.columns && !found; group += kPeriod) {
    const std::size_t end = group + kGroup < pass_.columns ? group + kGroup : pass_.columns;
    load_tile(row_, pass_.logits.type, group, end, pass_.transform, tile_);
    for (std::size_t i = 0; i < end - group && !found; ++i) {
      const float e = exp_scaled(bounded(all(tile_.z[i] - sums.base)))[0];
      if (e == 0) continue;
      label.y = group + i;  // the last one possible, where the crossing is hidden
      z_y = tile_.z[i];
      sum += e;
      found = !hidden && before + sum > target;
    }
  }
  return sums;
}

}  // namespace

void row_pass(const RowPass& pass, std::size_t first, std::size_t end) {
  Tile tile;
  for (std::size_t index = first; index < end; ++index) Row(pass, index, tile).run();
}

}  // namespace hfprune::HFPRUNE_ISA
