// The sums over a row of logits that each criterion needs, in one pass over its tiles: in each lane
// of a vector, s = sum exp(z - m) with the running maximum m, and others, times 2^24. Where the
// maximum rises, the sums are rescaled.
#pragma once

#include "tile.h"

namespace hfprune::HFPRUNE_ISA {

struct Sums {
  float base = kMasked;         // the maximum, 0 where all is masked
  float s = 0, u = 0, s_r = 0;  // s and s_r at least 1
  bool masked = false;
};

// By how much the maximum rises, at most kRise: exp of minus that is 0.
constexpr float kRise = 200;

inline float exp_of(float x) { return exp(all(x))[0]; }

struct Rescaling {
  float delta, factor;  // m - m', exp(delta)

  Rescaling(float from, float to, float sharpness = 1) {
    const float exact = (from - to) * sharpness;
    delta = from == kMasked ? 0 : exact < -kRise ? -kRise : exact;
    factor = from == kMasked ? 0 : exp_of(delta);  // of sums of nothing
  }
};

template <typename AddTile, typename Rescale>
float each_tile(const RowPass& pass, const void* row, Tile& tile, const Rescale& rescale,
                const AddTile& add) {
  float m = kMasked;
  for (std::size_t first = 0; first < pass.columns; first += kTile) {
    const float maximum =
        load_tile(row, pass.logits.type, first, pass.columns, pass.transform, tile);
    if (maximum > m) {
      rescale(m, maximum);
      m = maximum;
    }
    add(m == kMasked ? 0 : m, first);
  }
  return m;
}

inline Sums entropy_sums(const RowPass& pass, const void* row, Tile& tile) {
  Floats s{}, u{};
  Sums sums;
  sums.base = each_tile(
      pass, row, tile,
      [&](float from, float to) {
        const Rescaling alpha(from, to);
        u = alpha.factor * (u + alpha.delta * s);
        s = alpha.factor * s;
      },
      [&](float base, std::size_t) {
        Floats tile_s{}, tile_u{};
        for (std::size_t i = 0; i < tile.vectors_end(); i += kWidth) {
          const Floats d = bounded(tile.at(i) - base);
          const Floats e = exp_scaled(d);
          tile_s += e;
          tile_u = fma(d, e, tile_u);
        }
        s += tile_s;
        u += tile_u;
      });
  sums.s = sum_of(s);
  sums.u = sum_of(u);
  return sums;
}

inline Sums label_sums(const RowPass& pass, const void* row, Tile& tile) {
  Floats s{};
  Sums sums;
  sums.base = each_tile(
      pass, row, tile, [&](float from, float to) { s = Rescaling(from, to).factor * s; },
      [&](float base, std::size_t) {
        Floats tile_s{};
        for (std::size_t i = 0; i < tile.vectors_end(); i += kWidth) {
          tile_s += exp_scaled(bounded(tile.at(i) - base));
        }
        s += tile_s;
      });
  sums.s = sum_of(s);
  return sums;
}

// s_r and u are of exp(d / temperature) and d / temperature.
inline Sums distillation_sums(const RowPass& pass, const void* row, Tile& tile) {
  Floats s{}, s_r{}, u{};
  const float sharpness = 1 / pass.temperature;
  Sums sums;
  sums.base = each_tile(
      pass, row, tile,
      [&](float from, float to) {
        const Rescaling alpha(from, to, sharpness);
        s = Rescaling(from, to).factor * s;
        u = alpha.factor * (u + alpha.delta * s_r);
        s_r = alpha.factor * s_r;
      },
      [&](float base, std::size_t) {
        Floats tile_s{}, tile_r{}, tile_u{};
        for (std::size_t i = 0; i < tile.vectors_end(); i += kWidth) {
          const Floats d = tile.at(i) - base;
          const Floats scaled = bounded(d * sharpness);
          const Floats r = exp_scaled(scaled);
          tile_s += exp_scaled(bounded(d));
          tile_r += r;
          tile_u = fma(scaled, r, tile_u);
        }
        s += tile_s;
        s_r += tile_r;
        u += tile_u;
      });
  sums.s = sum_of(s);
  sums.s_r = sum_of(s_r);
  sums.u = sum_of(u);
  return sums;
}

}  // namespace hfprune::HFPRUNE_ISA
