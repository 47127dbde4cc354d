#include "bindings_kernels.h"

#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "kernels.h"

namespace py = pybind11;

namespace hfprune {
namespace {

// A tensor as Python passes it: its address, its strides but for the last one, which is 1, and its
// dtype.
using RowsArgument = std::tuple<std::uintptr_t, std::ptrdiff_t, std::string>;
using TokensArgument = std::tuple<std::uintptr_t, std::ptrdiff_t, std::ptrdiff_t>;
using TransformArgument = std::tuple<std::optional<float>, float>;  // softcap, logit_scale

template <typename Value>
Value named(const std::string& name, std::initializer_list<std::pair<const char*, Value>> table,
            const char* what) {
  for (const auto& [known, value] : table) {
    if (name == known) return value;
  }
  throw std::invalid_argument(std::string("unknown ") + what + " " + name);
}

Type type_of(const std::string& name) {
  return named<Type>(
      name, {{"float32", Type::float32}, {"bfloat16", Type::bfloat16}, {"float16", Type::float16}},
      "dtype");
}

Rows rows_of(const RowsArgument& argument) {
  const auto& [address, stride, type] = argument;
  return {reinterpret_cast<void*>(address), stride, type_of(type)};
}

Tokens tokens_of(const TokensArgument& argument) {
  const auto& [address, sequence_stride, token_stride] = argument;
  return {reinterpret_cast<void*>(address), sequence_stride, token_stride};
}

Transform transform_of(const TransformArgument& argument) {
  return {std::get<0>(argument).value_or(0), std::get<1>(argument)};
}

void row_pass(const RowsArgument& logits, std::size_t rows, std::size_t columns,
              std::uintptr_t values, const std::optional<RowsArgument>& grad,
              std::uintptr_t row_scale, std::uintptr_t keys, const std::string& criterion,
              float alpha, float temperature, const TransformArgument& transform, unsigned threads,
              const std::string& instructions) {
  RowPass pass;
  pass.rows = rows;
  pass.columns = columns;
  pass.logits = rows_of(logits);
  if (grad) pass.grad = rows_of(*grad);
  pass.row_scale = reinterpret_cast<const float*>(row_scale);
  pass.label = reinterpret_cast<const std::int64_t*>(keys);
  pass.uniform = reinterpret_cast<const float*>(keys);
  pass.values = reinterpret_cast<float*>(values);
  pass.criterion = named<Criterion>(criterion,
                                    {{"entropy", Criterion::entropy},
                                     {"cross_entropy", Criterion::cross_entropy},
                                     {"fisher", Criterion::fisher},
                                     {"self_distillation", Criterion::self_distillation}},
                                    "criterion");
  pass.transform = transform_of(transform);
  pass.alpha = alpha;
  pass.temperature = temperature;
  const py::gil_scoped_release release;
  run(pass, threads, instructions.c_str());
}

void kl_pass(const RowsArgument& logits, const RowsArgument& teacher, std::size_t rows,
             std::size_t columns, std::uintptr_t values, const RowsArgument& grad,
             std::uintptr_t row_scale, const TransformArgument& transform,
             const TransformArgument& teacher_transform, unsigned threads,
             const std::string& instructions) {
  KlPass pass;
  pass.rows = rows;
  pass.columns = columns;
  pass.logits = rows_of(logits);
  pass.teacher = rows_of(teacher);
  pass.grad = rows_of(grad);
  pass.row_scale = reinterpret_cast<const float*>(row_scale);
  pass.values = reinterpret_cast<float*>(values);
  pass.transform = transform_of(transform);
  pass.teacher_transform = transform_of(teacher_transform);
  const py::gil_scoped_release release;
  run(pass, threads, instructions.c_str());
}

void taylor_pass(const std::string& dtype, std::size_t sequences, std::size_t tokens,
                 std::size_t width, const std::string& activation, const TokensArgument& grad,
                 const TokensArgument& gate, const TokensArgument& up, const TokensArgument& d_gate,
                 const TokensArgument& d_up, std::uintptr_t is_token, std::uintptr_t sums,
                 unsigned threads, const std::string& instructions) {
  TaylorPass pass;
  pass.sequences = sequences;
  pass.tokens = tokens;
  pass.width = width;
  pass.type = type_of(dtype);
  pass.activation = named<Activation>(activation,
                                      {{"none", Activation::none},
                                       {"silu", Activation::silu},
                                       {"gelu", Activation::gelu},
                                       {"gelu_tanh", Activation::gelu_tanh}},
                                      "activation");
  pass.grad = tokens_of(grad);
  pass.gate = tokens_of(gate);
  pass.up = tokens_of(up);
  pass.d_gate = tokens_of(d_gate);
  pass.d_up = tokens_of(d_up);
  pass.is_token = reinterpret_cast<const std::uint8_t*>(is_token);
  pass.sums = reinterpret_cast<double*>(sums);
  const py::gil_scoped_release release;
  run(pass, threads, instructions.c_str());
}

}  // namespace

void bind_kernels(py::module_& module) {
  const TokensArgument no_tokens{0, 0, 0};
  module.def("kernel_instructions", &kernel_instructions);
  module.def("row_pass", &row_pass, py::arg("logits"), py::kw_only(), py::arg("rows"),
             py::arg("columns"), py::arg("values"), py::arg("grad"), py::arg("row_scale"),
             py::arg("keys"), py::arg("criterion"), py::arg("alpha"), py::arg("temperature"),
             py::arg("transform"), py::arg("threads"), py::arg("instructions"));
  module.def("kl_pass", &kl_pass, py::arg("logits"), py::arg("teacher"), py::kw_only(),
             py::arg("rows"), py::arg("columns"), py::arg("values"), py::arg("grad"),
             py::arg("row_scale"), py::arg("transform"), py::arg("teacher_transform"),
             py::arg("threads"), py::arg("instructions"));
  module.def("taylor_pass", &taylor_pass, py::arg("dtype"), py::kw_only(), py::arg("sequences"),
             py::arg("tokens"), py::arg("width"), py::arg("activation"), py::arg("grad"),
             py::arg("gate"), py::arg("up") = no_tokens, py::arg("d_gate") = no_tokens,
             py::arg("d_up") = no_tokens, py::arg("is_token"), py::arg("sums"), py::arg("threads"),
             py::arg("instructions"));
}

}  // namespace hfprune
