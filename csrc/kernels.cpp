#include "kernels.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

#include "parallel.h"

namespace hfprune {
namespace {

struct Instructions {
  const char* name;
  bool (*available)();
  void (*row_pass)(const RowPass&, std::size_t, std::size_t);
  void (*kl_pass)(const KlPass&, std::size_t, std::size_t);
  void (*taylor_pass)(const TaylorPass&, std::size_t, std::size_t);
};

constexpr Instructions kInstructions[] = {
#ifdef HFPRUNE_HAVE_AVX512
    {"avx512", [] { return static_cast<bool>(__builtin_cpu_supports("avx512f")); },
     avx512::row_pass, avx512::kl_pass, avx512::taylor_pass},
#endif
#ifdef HFPRUNE_HAVE_AVX2
    {"avx2",
     [] {
       return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
              __builtin_cpu_supports("f16c");
     },
     avx2::row_pass, avx2::kl_pass, avx2::taylor_pass},
#endif
    {"portable", [] { return true; }, portable::row_pass, portable::kl_pass, portable::taylor_pass},
};

const Instructions& named(const char* name) {
  for (const Instructions& one : kInstructions) {
    if (std::strcmp(one.name, name) == 0 && one.available()) return one;
  }
  throw std::invalid_argument(std::string("this CPU or build has no instructions named ") + name);
}

void check_data(const void* data, std::size_t alignment, const char* what) {
  if (data == nullptr || reinterpret_cast<std::uintptr_t>(data) % alignment != 0) {
    throw std::invalid_argument(std::string(what) + " must be data aligned to " +
                                std::to_string(alignment) + " bytes");
  }
}

// Throws unless count - 1 strides and `size` items lie within half of the address space.
void check_extent(std::ptrdiff_t stride, std::size_t count, std::size_t size, std::size_t item,
                  const char* what) {
  std::size_t extent = 0;
  if (stride < 0 || __builtin_mul_overflow(static_cast<std::size_t>(stride), count - 1, &extent) ||
      __builtin_add_overflow(extent, size, &extent) ||
      __builtin_mul_overflow(extent, item, &extent) || extent > PTRDIFF_MAX) {
    throw std::invalid_argument(std::string(what) + " has a stride or a size out of range");
  }
}

void check_rows(const Rows& rows, std::size_t count, std::size_t columns, const char* what) {
  const std::size_t item = item_bytes(rows.type);
  check_data(rows.data, item, what);
  check_extent(rows.stride, count, columns, item, what);
}

// Rows that are written must not overlap.
void check_written(const Rows& rows, std::size_t count, std::size_t columns) {
  check_rows(rows, count, columns, "grad");
  if (count > 1 && static_cast<std::size_t>(rows.stride) < columns) {
    throw std::invalid_argument("rows of grad overlap");
  }
}

void check_transform(const Transform& transform) {
  if (!(transform.softcap >= 0) || !(transform.scale > 0)) {
    throw std::invalid_argument("softcap must be at least 0 and the scale positive");
  }
}

void check_tokens(const Tokens& tokens, const TaylorPass& pass, const char* what) {
  const std::size_t item = item_bytes(pass.type);
  check_data(tokens.data, item, what);
  check_extent(tokens.token_stride, pass.tokens, pass.width, item, what);
  const std::size_t sequence =
      static_cast<std::size_t>(tokens.token_stride) * (pass.tokens - 1) + pass.width;
  check_extent(tokens.sequence_stride, pass.sequences, sequence, item, what);
}

// Rows go to a thread in groups of this many logits.
constexpr std::size_t kPieceLogits = 1 << 16;

template <typename Pass>
void run_rows(const Pass& pass, unsigned threads,
              void (*function)(const Pass&, std::size_t, std::size_t)) {
  const std::size_t group = std::max<std::size_t>(1, kPieceLogits / pass.columns);
  in_parallel(threads, (pass.rows + group - 1) / group, [&](std::size_t piece) {
    function(pass, piece * group, std::min(pass.rows, (piece + 1) * group));
  });
}

}  // namespace

std::vector<const char*> kernel_instructions() {
  std::vector<const char*> names;
  for (const Instructions& one : kInstructions) {
    if (one.available()) names.push_back(one.name);
  }
  return names;
}

void run(const RowPass& pass, unsigned threads, const char* instructions) {
  const Instructions& chosen = named(instructions);
  if (pass.rows == 0 || pass.columns == 0) return;
  check_rows(pass.logits, pass.rows, pass.columns, "logits");
  check_data(pass.values, sizeof(float), "values");
  if (pass.grad.data != nullptr) {
    check_written(pass.grad, pass.rows, pass.columns);
    check_data(pass.row_scale, sizeof(float), "row_scale");
  }
  if (pass.criterion == Criterion::fisher) {
    check_data(pass.uniform, sizeof(float), "uniform");
  } else if (pass.criterion != Criterion::entropy) {
    check_data(pass.label, sizeof(std::int64_t), "label");
  }
  check_transform(pass.transform);
  if (!(pass.temperature > 0)) throw std::invalid_argument("temperature must be positive");
  run_rows(pass, threads, chosen.row_pass);
}

void run(const KlPass& pass, unsigned threads, const char* instructions) {
  const Instructions& chosen = named(instructions);
  if (pass.rows == 0 || pass.columns == 0) return;
  check_rows(pass.logits, pass.rows, pass.columns, "logits");
  check_rows(pass.teacher, pass.rows, pass.columns, "teacher");
  check_written(pass.grad, pass.rows, pass.columns);
  check_data(pass.row_scale, sizeof(float), "row_scale");
  check_data(pass.values, sizeof(float), "values");
  check_transform(pass.transform);
  check_transform(pass.teacher_transform);
  run_rows(pass, threads, chosen.kl_pass);
}

void run(const TaylorPass& pass, unsigned threads, const char* instructions) {
  const Instructions& chosen = named(instructions);
  if (pass.sequences == 0 || pass.tokens == 0 || pass.width == 0) return;
  check_data(pass.sums, sizeof(double), "sums");
  check_tokens(pass.grad, pass, "grad");
  check_tokens(pass.gate, pass, "gate");
  if (pass.activation != Activation::none) {
    check_tokens(pass.up, pass, "up");
    check_tokens(pass.d_gate, pass, "d_gate");
    check_tokens(pass.d_up, pass, "d_up");
  }
  // A few strips a thread, whole cache lines apart, and no narrower than a prefetcher likes.
  constexpr std::size_t unit = 128;
  const std::size_t share = pass.width / (4 * static_cast<std::size_t>(std::max(1u, threads)));
  const std::size_t strip = std::clamp(share / unit * unit, 2 * unit, kStrip);
  in_parallel(threads, (pass.width + strip - 1) / strip, [&](std::size_t piece) {
    chosen.taylor_pass(pass, piece * strip, std::min(pass.width, (piece + 1) * strip));
  });
}

}  // namespace hfprune
