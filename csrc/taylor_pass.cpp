// The Taylor statistics of neurons and the gradients of a gated activation; compiled once per
// instruction set.
//
// A call walks all tokens of its neurons, in blocks: the sums of a block are fp32, those of the
// blocks fp64. A neuron's numbers do not depend on which others are walked with it.

#include "activation.h"

namespace hfprune::HFPRUNE_ISA {
namespace {

constexpr std::size_t kBlock = 64;    // tokens
constexpr std::size_t kTogether = 4;  // tokens whose terms are added in registers

// Four sums of each neuron of a strip, in the cache.
template <typename T>
struct StripSums {
  alignas(64) T l1[kStrip], l2[kStrip], x[kStrip], act[kStrip];
};

struct Terms {
  Floats l1{}, l2{}, x{}, act{};
};

template <typename T>
struct Pointers {
  const T *grad, *gate, *up;
  T *d_gate, *d_up;
};

template <typename T>
T* token(const Tokens& tokens, std::size_t sequence, std::size_t t, std::size_t neuron) {
  return static_cast<T*>(tokens.data) +
         static_cast<std::ptrdiff_t>(sequence) * tokens.sequence_stride +
         static_cast<std::ptrdiff_t>(t) * tokens.token_stride + neuron;
}

// Reads and writes `count` items of a vector at `at`.
template <typename T>
struct Whole {
  static Floats read(const T* from, std::size_t) { return load(from); }
  static void write(T* to, Floats x, std::size_t) { store(to, x); }
};
template <typename T>
struct Part {
  static Floats read(const T* from, std::size_t count) { return load_part(from, count, 0); }
  static void write(T* to, Floats x, std::size_t count) { store_part(to, x, count); }
};

// act_fn(gate) and its slope of some tokens, of a part of a strip.
struct Activated {
  static constexpr std::size_t columns = 256;
  alignas(64) float value[kTogether][columns], slope[kTogether][columns];
};

// The vectors of a tensor's row: each(at, access, count of numbers).
template <typename T, typename Each>
inline void each_vector(std::size_t begin, std::size_t end, Each each) {
  std::size_t at = begin;
  for (; at + kWidth <= end; at += kWidth) each(at, Whole<T>{}, kWidth);
  if (at < end) each(at, Part<T>{}, end - at);
}

template <Activation activation, std::size_t together, typename T>
inline void activate(const Pointers<T>* tokens, std::size_t begin, std::size_t end,
                     Activated& activated) {
  for (std::size_t k = 0; k < together; ++k) {
    each_vector<T>(begin, end, [&, k](std::size_t at, auto access, std::size_t count) {
      const auto f = value_and_slope<activation>(access.read(tokens[k].gate + at, count));
      store(activated.value[k] + (at - begin), f.value);
      store(activated.slope[k] + (at - begin), f.slope);
    });
  }
}

inline void add_to(float* sums, Floats terms) { store(sums, load(sums) + terms); }

// Adds tokens to the sums of a strip. The activation has a loop of its own: in one with the rest,
// so long a chain of instructions a vector would leave the CPU waiting.
template <Activation activation, std::size_t together, typename T>
void add_tokens(const Pointers<T>* tokens, std::size_t width, StripSums<float>& sums) {
  constexpr bool gated = activation != Activation::none;
  Activated activated;
  for (std::size_t begin = 0; begin < width; begin += Activated::columns) {
    const std::size_t end = width - begin < Activated::columns ? width : begin + Activated::columns;
    if constexpr (gated) activate<activation, together>(tokens, begin, end, activated);
    each_vector<T>(begin, end, [&](std::size_t at, auto access, std::size_t count) {
      Terms terms;
      for (std::size_t k = 0; k < together; ++k) {
        const Pointers<T>& p = tokens[k];
        const Floats g = access.read(p.grad + at, count);
        Floats a{};
        if constexpr (gated) {
          const Floats up = access.read(p.up + at, count);
          const Floats value = load(activated.value[k] + (at - begin));
          const Floats slope = load(activated.slope[k] + (at - begin));
          access.write(p.d_gate + at, slope * g * up, count);
          access.write(p.d_up + at, value * g, count);
          a = value * up;
        } else {
          a = access.read(p.gate + at, count);
        }
        const Floats x = g * a;
        terms.l1 += magnitude(x);
        terms.l2 = fma(x, x, terms.l2);
        terms.x += x;
        terms.act = fma(a, a, terms.act);
      }
      add_to(sums.l1 + at, terms.l1);
      add_to(sums.l2 + at, terms.l2);
      add_to(sums.x + at, terms.x);
      add_to(sums.act + at, terms.act);
    });
  }
}

template <Activation activation, typename T>
class Strip {
 public:
  Strip(const TaylorPass& pass, std::size_t first, std::size_t end)
      : pass_(pass), first_(first), width_(end - first) {}

  void run() {
    zero(total_);
    for (std::size_t b = 0; b < pass_.sequences; ++b) {
      zero_x();
      for (std::size_t start = 0; start < pass_.tokens; start += kBlock) {
        const std::size_t end = start + kBlock < pass_.tokens ? start + kBlock : pass_.tokens;
        add_block(b, start, end);
      }
      for (std::size_t i = 0; i < width_; ++i) mask_[i] += total_.x[i] * total_.x[i];
    }
    for (std::size_t i = 0; i < width_; ++i) {
      double* to = pass_.sums + first_ + i;
      to[0] = total_.l1[i];
      to[pass_.width] = total_.l2[i];
      to[2 * pass_.width] = mask_[i];
      to[3 * pass_.width] = total_.act[i];
    }
  }

 private:
  template <typename U>
  static void zero(StripSums<U>& sums) {
    std::memset(&sums, 0, sizeof sums);
  }
  void zero_x() { std::memset(total_.x, 0, sizeof total_.x); }

  void add_block(std::size_t b, std::size_t start, std::size_t end) {
    Pointers<T> tokens[kTogether];
    std::size_t ready = 0;
    zero(block_);
    for (std::size_t t = start; t < end; ++t) {
      tokens[ready] = pointers(b, t);
      if (pass_.is_token != nullptr && pass_.is_token[b * pass_.tokens + t] == 0) {
        if (activation == Activation::none) continue;
        std::memset(tokens[ready].d_gate, 0, width_ * sizeof(T));
        std::memset(tokens[ready].d_up, 0, width_ * sizeof(T));
        continue;
      }
      if (++ready == kTogether) {
        add_tokens<activation, kTogether>(tokens, width_, block_);
        ready = 0;
      }
    }
    for (std::size_t k = 0; k < ready; ++k) add_tokens<activation, 1>(tokens + k, width_, block_);
    for (std::size_t i = 0; i < width_; ++i) {
      total_.l1[i] += static_cast<double>(block_.l1[i]);
      total_.l2[i] += static_cast<double>(block_.l2[i]);
      total_.x[i] += static_cast<double>(block_.x[i]);
      total_.act[i] += static_cast<double>(block_.act[i]);
    }
  }

  Pointers<T> pointers(std::size_t b, std::size_t t) const {
    Pointers<T> found{token<T>(pass_.grad, b, t, first_), token<T>(pass_.gate, b, t, first_),
                      nullptr, nullptr, nullptr};
    if (activation != Activation::none) {
      found.up = token<T>(pass_.up, b, t, first_);
      found.d_gate = token<T>(pass_.d_gate, b, t, first_);
      found.d_up = token<T>(pass_.d_up, b, t, first_);
    }
    return found;
  }

  const TaylorPass& pass_;
  std::size_t first_, width_;
  StripSums<float> block_;
  StripSums<double> total_;  // x of the sequence
  double mask_[kStrip] = {};
};

template <Activation activation>
void run_type(const TaylorPass& pass, std::size_t first, std::size_t end) {
  if (pass.type == Type::float32) return Strip<activation, float>(pass, first, end).run();
  if (pass.type == Type::bfloat16) return Strip<activation, BFloat16>(pass, first, end).run();
  Strip<activation, Float16>(pass, first, end).run();
}

}  // namespace

void taylor_pass(const TaylorPass& pass, std::size_t first, std::size_t end) {
  if (pass.activation == Activation::none) return run_type<Activation::none>(pass, first, end);
  if (pass.activation == Activation::silu) return run_type<Activation::silu>(pass, first, end);
  if (pass.activation == Activation::gelu) return run_type<Activation::gelu>(pass, first, end);
  run_type<Activation::gelu_tanh>(pass, first, end);
}

}  // namespace hfprune::HFPRUNE_ISA
