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
  Floats at(std::size_t i) const { return load(reinterpret_cast<const Float32*>(z + i)); }
  void put(std::size_t i, Floats value) { store(reinterpret_cast<Float32*>(z + i), value); }
};

// Copies logits to a tile in fp32 and returns their maximum, kMasked at least; NaN may be left out.
template <typename T>
float load_plain(const T* from, std::size_t count, float scale, Tile& tile) {
  tile.count = count;
  Floats first = all(kMasked), second = first;
  std::size_t i = 0;
  for (; i + 2 * kWidth <= count; i += 2 * kWidth) {
    const Floats a = load(from + i) * scale, b = load(from + i + kWidth) * scale;
    tile.put(i, a);
    tile.put(i + kWidth, b);
    first = larger(a, first);
    second = larger(b, second);
  }
  for (; i + kWidth <= count; i += kWidth) {
    const Floats a = load(from + i) * scale;
    tile.put(i, a);
    first = larger(a, first);
  }
  if (i < count) {
    const Floats a = load_part(from + i, count - i, kMasked) * scale;
    tile.put(i, a);
    first = larger(a, first);
  }
  return maximum_of(larger(first, second));
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
    maximum = load_plain(static_cast<const Float32*>(from), count, transform.scale, tile);
  } else if (type == Type::bfloat16) {
    maximum = load_plain(static_cast<const BFloat16*>(from), count, transform.scale, tile);
  } else {
    maximum = load_plain(static_cast<const Float16*>(from), count, transform.scale, tile);
  }
  return transform.softcap == 0 ? maximum : cap(tile, transform.softcap);
}

// Writes the result of gradient(z) for each transformed logit z of a tile, times the slope of the
// transform but for its scale; a masked logit has none.
template <typename G, typename Gradient>
void store_gradient(const Tile& tile, float softcap, G* to, const Gradient& gradient) {
  const float inverse = softcap == 0 ? 0 : 1 / softcap;
  for (std::size_t i = 0; i < tile.vectors_end(); i += kWidth) {
    const Floats z = tile.at(i);
    const Floats share = z * inverse;
    Floats result = gradient(i, z);
    if (softcap != 0) result = result * (1.0f - share * share);
    result = z == kMasked ? Floats{} : result;
    if (i + kWidth <= tile.count) {
      store(to + i, result);
    } else {
      store_part(to + i, result, tile.count - i);
    }
  }
}

template <typename Gradient>
void store_gradient(const Tile& tile, float softcap, const Rows& grad, void* row, std::size_t first,
                    const Gradient& gradient) {
  void* to = element(row, static_cast<std::ptrdiff_t>(first), grad.type);
  if (grad.type == Type::float32) {
    store_gradient(tile, softcap, static_cast<Float32*>(to), gradient);
  } else if (grad.type == Type::bfloat16) {
    store_gradient(tile, softcap, static_cast<BFloat16*>(to), gradient);
  } else {
    store_gradient(tile, softcap, static_cast<Float16*>(to), gradient);
  }
}

inline void store_zeros(const Rows& grad, void* row, std::size_t columns) {
  std::memset(row, 0, columns * item_bytes(grad.type));
}

}  // namespace hfprune::HFPRUNE_ISA
