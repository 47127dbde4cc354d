// The kernels' passes on guarded memory, in every instruction set and several threads, against
// plain fp64 loops.

#include <cmath>
#include <limits>

#include "check.h"
#include "kernels.h"

using hfprune::Activation;
using hfprune::Criterion;
using hfprune::Type;

namespace {

constexpr double kInfinity = std::numeric_limits<double>::infinity();

// Numbers in the memory of a type, no byte larger than they are, so that a sanitizer sees overruns.
struct Numbers {
  Type type;
  std::vector<std::uint8_t> bytes;

  Numbers(Type of, std::size_t count) : type(of), bytes(count * hfprune::item_bytes(of)) {}

  void set(std::size_t i, float x) {
    std::uint32_t bits = 0;
    std::memcpy(&bits, &x, 4);
    if (type == Type::float32) return void(std::memcpy(&bytes[4 * i], &bits, 4));
    std::uint16_t half = static_cast<std::uint16_t>(bits >> 16);
    if (type == Type::float16) {  // small whole numbers of eighths, and -inf
      const std::uint32_t exponent = (bits >> 23) & 0xFFu;
      const std::uint32_t biased = x == 0 ? 0 : exponent == 255 ? 31 : exponent - 112;
      half =
          static_cast<std::uint16_t>((bits >> 16 & 0x8000u) | biased << 10 | (bits >> 13 & 0x3FFu));
    }
    std::memcpy(&bytes[2 * i], &half, 2);
  }
  double get(std::size_t i) const {
    if (type == Type::float32) {
      float x = 0;
      std::memcpy(&x, &bytes[4 * i], 4);
      return static_cast<double>(x);
    }
    std::uint16_t half = 0;
    std::memcpy(&half, &bytes[2 * i], 2);
    if (type == Type::bfloat16) {
      const std::uint32_t bits = static_cast<std::uint32_t>(half) << 16;
      float x = 0;
      std::memcpy(&x, &bits, 4);
      return static_cast<double>(x);
    }
    const int exponent = half >> 10 & 31, fraction = half & 0x3FF;
    const double sign = half & 0x8000 ? -1 : 1;
    if (exponent == 31) return sign * kInfinity;
    return exponent == 0 ? sign * std::ldexp(fraction, -24)
                         : sign * std::ldexp(1024 + fraction, exponent - 25);
  }
};

float eighths(std::size_t size) {
  return static_cast<float>(below(2 * size + 1)) / 8 - static_cast<float>(size) / 8;
}

double rounding(Type type) {
  return type == Type::float32 ? 1e-5 : type == Type::bfloat16 ? 0x1p-8 : 0x1p-11;
}

// The words are joined on a failure alone: there are millions of numbers.
void expect(double got, double expected, double allowed, const std::string& of, const char* what) {
  if (!(std::abs(got - expected) <= allowed)) {
    fail(of + ", " + what + ": " + std::to_string(got) + ", expected " + std::to_string(expected));
  }
}

Numbers logits_of(Type type, std::size_t rows, std::size_t columns) {
  Numbers made(type, rows * columns);
  for (std::size_t i = 0; i < rows * columns; ++i) {
    const bool masked = i % columns != 0 && below(9) == 0;
    made.set(i, masked ? -std::numeric_limits<float>::infinity() : eighths(40));
  }
  return made;
}

// log softmax of one row.
std::vector<double> log_p(const Numbers& logits, std::size_t row, std::size_t columns) {
  double sum = 0;
  for (std::size_t i = 0; i < columns; ++i) sum += std::exp(logits.get(row * columns + i));
  std::vector<double> result;
  for (std::size_t i = 0; i < columns; ++i) {
    result.push_back(logits.get(row * columns + i) - std::log(sum));
  }
  return result;
}

void check_rows(const char* instructions, Type type, std::size_t columns, unsigned threads) {
  const std::size_t rows = threads == 1 ? 2 : 150'000 / columns + 2;
  const Numbers before = logits_of(type, rows, columns);
  Numbers grad = before;
  std::vector<float> values(rows), teacher_values(rows);
  const std::vector<float> scale(rows, 1);
  hfprune::RowPass pass;
  pass.rows = rows;
  pass.columns = columns;
  const auto stride = static_cast<std::ptrdiff_t>(columns);
  pass.logits = pass.grad = {grad.bytes.data(), stride, type};
  pass.row_scale = scale.data();
  pass.values = values.data();
  hfprune::run(pass, threads, instructions);

  const Numbers teacher = logits_of(Type::float32, rows, columns);
  Numbers source = before, d_logits(type, rows * columns), teachers = teacher;
  for (std::size_t i = 0; i < rows * columns; ++i) {
    if (std::isinf(before.get(i))) teachers.set(i, -std::numeric_limits<float>::infinity());
  }
  hfprune::KlPass kl;
  kl.rows = rows;
  kl.columns = columns;
  kl.logits = {source.bytes.data(), stride, type};
  kl.teacher = {teachers.bytes.data(), stride, Type::float32};
  kl.grad = {d_logits.bytes.data(), stride, type};
  kl.row_scale = scale.data();
  kl.values = teacher_values.data();
  hfprune::run(kl, threads, instructions);

  const std::string what = std::string(instructions) + " rows of " + std::to_string(columns);
  for (std::size_t row = 0; row < rows; row += rows / 2) {
    const auto log_q = log_p(before, row, columns), log_t = log_p(teachers, row, columns);
    double entropy = 0, divergence = 0;
    for (std::size_t i = 0; i < columns; ++i) {
      const double q = std::exp(log_q[i]), p = std::exp(log_t[i]);
      if (q > 0) entropy -= q * log_q[i];
      if (p > 0) divergence += p * (log_t[i] - log_q[i]);
    }
    expect(static_cast<double>(values[row]), entropy, 1e-4, what, "entropy");
    expect(static_cast<double>(teacher_values[row]), divergence, 1e-4, what, "divergence");
    for (std::size_t i = 0; i < columns; ++i) {
      const double q = std::exp(log_q[i]), p = std::exp(log_t[i]);
      const double slope = q > 0 ? -q * (log_q[i] + entropy) : 0;
      const double allowed = 1e-5 + rounding(type);
      expect(grad.get(row * columns + i), slope, allowed * (1 + std::abs(slope)), what, "grad");
      expect(d_logits.get(row * columns + i), q - p, allowed, what, "grad of the divergence");
    }
  }
  ++cases;
}

void check_tokens(const char* instructions, Type type, std::size_t width, unsigned threads) {
  const std::size_t sequences = 2, tokens = 70, count = sequences * tokens * width;
  Numbers grad(type, count), gate(type, count), up(type, count), d_up(type, count);
  for (std::size_t i = 0; i < count; ++i) {
    for (Numbers* numbers : {&grad, &gate, &up}) numbers->set(i, eighths(16));
  }
  const Numbers gate_before = gate;
  std::vector<std::uint8_t> is_token(sequences * tokens, 1);
  is_token[3] = is_token[tokens + 65] = 0;
  std::vector<double> sums(4 * width);
  hfprune::TaylorPass pass;
  pass.sequences = sequences;
  pass.tokens = tokens;
  pass.width = width;
  pass.type = type;
  pass.activation = Activation::silu;
  const auto of = [&](Numbers& numbers) {
    const auto stride = static_cast<std::ptrdiff_t>(width);
    return hfprune::Tokens{numbers.bytes.data(), stride * static_cast<std::ptrdiff_t>(tokens),
                           stride};
  };
  pass.grad = of(grad);
  pass.gate = pass.d_gate = of(gate);
  pass.up = of(up);
  pass.d_up = of(d_up);
  pass.is_token = is_token.data();
  pass.sums = sums.data();
  hfprune::run(pass, threads, instructions);

  const std::string what = std::string(instructions) + " tokens of " + std::to_string(width);
  for (std::size_t j = 0; j < width; ++j) {
    double l1 = 0, l2 = 0, mask = 0, act = 0;
    for (std::size_t b = 0; b < sequences; ++b) {
      double sequence = 0;
      for (std::size_t t = 0; t < tokens; ++t) {
        const std::size_t i = (b * tokens + t) * width + j;
        const bool counts = is_token[b * tokens + t] != 0;
        const double z = gate_before.get(i), s = 1 / (1 + std::exp(-z));
        const double g = grad.get(i), a = z * s * up.get(i);
        const double d = g * up.get(i) * s * (1 + z * (1 - s));
        const double allowed = (rounding(type) + 1e-5) * (1 + std::abs(d));
        expect(gate.get(i), counts ? d : 0, allowed, what, "d_gate");
        expect(d_up.get(i), counts ? g * z * s : 0, (rounding(type) + 1e-5) * 5, what, "d_up");
        if (!counts) continue;
        l1 += std::abs(g * a);
        l2 += g * a * g * a;
        sequence += g * a;
        act += a * a;
      }
      mask += sequence * sequence;
    }
    const double expected[] = {l1, l2, mask, act};
    for (std::size_t k = 0; k < 4; ++k) {
      expect(sums[k * width + j], expected[k], 1e-3 * (1 + expected[k]), what, "sums");
    }
  }
  ++cases;
}

}  // namespace

void check_kernels() {
  for (const char* name : hfprune::kernel_instructions()) {
    for (const Type type : {Type::float32, Type::bfloat16, Type::float16}) {
      for (const std::size_t size : {1, 3, 8, 17, 33, 300, 2049, 4103}) {
        check_rows(name, type, size, 1);
        check_tokens(name, type, size, 1);
      }
      check_rows(name, type, 4103, 3);
      check_tokens(name, type, 2049, 3);
    }
    const auto null_logits = [&] {
      hfprune::RowPass pass;
      pass.rows = pass.columns = 1;
      hfprune::run(pass, 1, name);
    };
    must_throw<std::invalid_argument>("logits at no address", null_logits);
  }
  must_throw<std::invalid_argument>("unknown instructions",
                                    [] { hfprune::run(hfprune::RowPass{}, 1, "none"); });
}
