// The kernels' CPU backend: passes over rows of logits, and over the tokens of an MLP's neurons.
//
// The equations are in kernels/_criterion.py, linear_kl.py and taylor.py. Every pass computes in
// fp32 and gives the same bits for any number of threads. Sizes and strides count elements.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

namespace hfprune {

enum class Type { float32, bfloat16, float16 };
enum class Criterion { entropy, cross_entropy, fisher, self_distillation };
enum class Activation { none, silu, gelu, gelu_tanh };

// Static, as the files compiled for one instruction set call it, see vector.h.
static constexpr std::size_t item_bytes(Type type) { return type == Type::float32 ? 4 : 2; }

// Rows of numbers: `stride` items from a row to the next, and the numbers of a row side by side.
struct Rows {
  void* data = nullptr;
  std::ptrdiff_t stride = 0;
  Type type = Type::float32;
};

// z = softcap tanh(scale logit / softcap), or scale logit where softcap is 0.
struct Transform {
  float softcap = 0;
  float scale = 1;
};

// A value for each of `rows` rows of `columns` logits and, where `grad` has data, row_scale times
// its gradient. grad may be the logits. Writes values, and grad.
struct RowPass {
  std::size_t rows = 0, columns = 0;
  Rows logits, grad;
  const float* row_scale = nullptr;     // with grad
  const std::int64_t* label = nullptr;  // cross_entropy and self_distillation
  const float* uniform = nullptr;       // fisher
  float* values = nullptr;
  Criterion criterion = Criterion::entropy;
  Transform transform;
  float alpha = 0, temperature = 1;  // self_distillation
};

// KL(softmax(teacher) || softmax(logits)) of each row, and row_scale times its gradient by logits.
struct KlPass {
  std::size_t rows = 0, columns = 0;
  Rows logits, teacher, grad;
  const float* row_scale = nullptr;
  float* values = nullptr;
  Transform transform, teacher_transform;
};

// Tokens of `width` numbers side by side, a stride from a token to the next, and one from a
// sequence to the next.
struct Tokens {
  void* data = nullptr;
  std::ptrdiff_t sequence_stride = 0, token_stride = 0;
};

// The sums l1, l2, fisher_mask and act over all tokens: 4 x width fp64. Without an activation
// `gate` is act itself; with one, act = activation(gate) up, and the gradients are written, which
// may lie over grad, gate and up. Sums of 64 tokens are fp32 and their sums fp64.
struct TaylorPass {
  std::size_t sequences = 0, tokens = 0, width = 0;
  Type type = Type::float32;
  Activation activation = Activation::none;
  Tokens grad, gate, up, d_gate, d_up;
  const std::uint8_t* is_token = nullptr;  // sequences x tokens; 0: neither read nor counted
  double* sums = nullptr;
};

constexpr std::size_t kStrip = 1024;  // neurons that a call of taylor_pass walks at most

// Run a pass in at most `threads` threads, in one parallel region. `instructions` is one of
// kernel_instructions(). Throws std::invalid_argument for sizes and strides that overflow, null
// data, data that is not aligned to its items and another name; nothing was then written.
void run(const RowPass& pass, unsigned threads, const char* instructions);
void run(const KlPass& pass, unsigned threads, const char* instructions);
void run(const TaylorPass& pass, unsigned threads, const char* instructions);

// Of "avx512", "avx2" and "portable", those that were built and that this CPU has, best first.
std::vector<const char*> kernel_instructions();

// What each instruction set implements: [first, end) of the rows, or of the neurons at most kStrip.
#define HFPRUNE_KERNELS(ISA)                                                    \
  namespace ISA {                                                               \
  void row_pass(const RowPass& pass, std::size_t first, std::size_t end);       \
  void kl_pass(const KlPass& pass, std::size_t first, std::size_t end);         \
  void taylor_pass(const TaylorPass& pass, std::size_t first, std::size_t end); \
  }
HFPRUNE_KERNELS(portable)
HFPRUNE_KERNELS(avx2)
HFPRUNE_KERNELS(avx512)
#undef HFPRUNE_KERNELS

}  // namespace hfprune
