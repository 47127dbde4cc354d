// Rows of logits in tiles of fp32 that stay in the cache: loaded, transformed and padded.
#pragma once

#include "vector.h"

namespace hfprune::HFPRUNE_ISA {

constexpr std::size_t kTile = 2048;
constexpr float kMasked = -__builtin_inff();

// Transformed logits of one tile; behind the last one to a whole vector, kMasked.
struct Tile {
  alignas(64) float z[kTile];
  std::size_t count;

  std::size_t vectors_end() const { return (count + kWidth - 1) / kWidth * kWidth; }
  Floats at(std::size_t i) const { return load(z + i); }
  void put(std::size_t i, Floats value) { store(z + i, value); }
};

// Copies logits to a tile in fp32 and returns their maximum, kMasked at least; NaN may be left out.
template <bool scaled, typename T>
float load_plain(const T* from, std::size_t count, float scale, Tile& tile) {
  const auto transformed = [scale](Floats z) { return scaled ? z * scale : z; };
  tile.count = count;
  Floats first = all(kMasked), second = first;
  std::size_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    const Floats a = transformed(load(from + i)), b = transformed(load(from + i + kWidth));
    tile.put(i, a);
    tile.put(i + kWidth, b);
    first = larger(a, first);
    second = larger(b, second);
  }
  for (; i < count; i += kWidth) {
    const std::size_t left = count - i;
    const Floats a =
        transformed(left < kWidth ? load_part(from + i, left, kMasked) : load(from + i));
    tile.put(i, a);
    first = larger(a, first);
  }
  return maximum_of(larger(first, second));
}

template <typename T>
float load_scaled(const void* from, std::size_t count, float scale, Tile& tile) {
  const T* items = static_cast<const T*>(from);
  return scale == 1 ? load_plain<false>(items, count, scale, tile)
                    : load_plain<true>(items, count, scale, tile);
}

inline float cap(Tile& tile, float softcap) {
  Floats maximum = all(kMasked);
  for (std::size_t i = 0; i < tile.vectors_end(); i += kWidth) {
    const Floats z = tile.at(i);
    const Floats capped = z == kMasked ? z : softcap * tanh(z * (1 / softcap));
    tile.put(i, capped);
    maximum = larger(capped, maximum);
  }
  return maximum_of(maximum);
}

inline const void* element(const void* data, std::ptrdiff_t index, Type type) {
  return static_cast<const char*>(data) + index * static_cast<std::ptrdiff_t>(item_bytes(type));
}

inline void* element(void* data, std::ptrdiff_t index, Type type) {
  return static_cast<char*>(data) + index * static_cast<std::ptrdiff_t>(item_bytes(type));
}

// Loads and transforms the tile of a row that starts at `first`; returns its maximum.
inline float load_tile(const void* row, Type type, std::size_t first, std::size_t columns,
                       const Transform& transform, Tile& tile) {
  const std::size_t count = columns - first < kTile ? columns - first : kTile;
  const void* from = element(row, static_cast<std::ptrdiff_t>(first), type);
  float maximum = 0;
  if (type == Type::float32) {
    maximum = load_scaled<float>(from, count, transform.scale, tile);
  } else if (type == Type::bfloat16) {
    maximum = load_scaled<BFloat16>(from, count, transform.scale, tile);
  } else {
    maximum = load_scaled<Float16>(from, count, transform.scale, tile);
  }
  return transform.softcap == 0 ? maximum : cap(tile, transform.softcap);
}

// What a gradient by transformed logits is multiplied by to be one by logits, but for the scale;
// guarded, a masked logit has none, also where the gradient is infinite or NaN.
template <bool guarded>
inline Floats through_transform(Floats gradient, Floats z, float inverse_softcap) {
  if (!guarded) return gradient;
  const Floats share = z * inverse_softcap;
  return z == kMasked ? Floats{} : gradient * (1.0f - share * share);
}

// Replaces each transformed logit z of a tile by gradient(i, z), and writes the tile to a row. Two
// loops: in one, so long a chain of instructions a vector would leave the CPU waiting. `gradient`
// is taken by value, so that what it holds can stay in registers.
template <bool guarded, typename G, typename Gradient>
void store_each(Tile& tile, float softcap, G* to, Gradient gradient) {
  const float inverse = softcap == 0 ? 0 : 1 / softcap;
  const std::size_t count = tile.count, end = tile.vectors_end();
  for (std::size_t i = 0; i < end; i += kWidth) {
    const Floats z = tile.at(i);
    tile.put(i, through_transform<guarded>(gradient(i, z), z, inverse));
  }
  std::size_t i = 0;
  for (; i + kWidth <= count; i += kWidth) store(to + i, tile.at(i));
  if (i < count) store_part(to + i, tile.at(i), count - i);
}

template <bool guarded, typename Gradient>
void store_typed(Tile& tile, float softcap, const Rows& grad, void* to, const Gradient& gradient) {
  if (grad.type == Type::float32) {
    store_each<guarded>(tile, softcap, static_cast<float*>(to), gradient);
  } else if (grad.type == Type::bfloat16) {
    store_each<guarded>(tile, softcap, static_cast<BFloat16*>(to), gradient);
  } else {
    store_each<guarded>(tile, softcap, static_cast<Float16*>(to), gradient);
  }
}

// Of the tile that starts at `first` of a row, which is used up. `finite`: gradient is 0 at a
// masked logit itself.
template <typename Gradient>
void store_gradient(Tile& tile, float softcap, const Rows& grad, void* row, std::size_t first,
                    bool finite, const Gradient& gradient) {
  void* to = element(row, static_cast<std::ptrdiff_t>(first), grad.type);
  if (finite && softcap == 0) {
    store_typed<false>(tile, softcap, grad, to, gradient);
  } else {
    store_typed<true>(tile, softcap, grad, to, gradient);
  }
}

inline void store_zeros(const Rows& grad, void* row, std::size_t columns) {
  std::memset(row, 0, columns * item_bytes(grad.type));
}

}  // namespace hfprune::HFPRUNE_ISA
