// hfprune_fast._C: translates types and errors, nothing else. Its signatures are in _C.pyi.

#include <pybind11/pybind11.h>

#include <optional>
#include <system_error>

#include "bindings_kernels.h"
#include "compact.h"
#include "write.h"

namespace py = pybind11;
using namespace hfprune;

namespace {

// The bytes of an object that lie in one block, for as long as this lives.
class Bytes {
 public:
  Bytes(const py::handle& object, bool writable) {
    if (PyObject_GetBuffer(object.ptr(), &view_, writable ? PyBUF_WRITABLE : PyBUF_SIMPLE) != 0) {
      throw py::error_already_set();
    }
  }
  ~Bytes() { PyBuffer_Release(&view_); }
  Bytes(const Bytes&) = delete;
  Bytes& operator=(const Bytes&) = delete;

  std::uint8_t* data() const { return static_cast<std::uint8_t*>(view_.buf); }
  std::size_t size() const { return static_cast<std::size_t>(view_.len); }

 private:
  Py_buffer view_{};
};

// Indices as 8-byte integers, whatever array they are in.
class Indices {
 public:
  explicit Indices(const py::handle& object) : bytes_(object, false) {
    const bool aligned =
        reinterpret_cast<std::uintptr_t>(bytes_.data()) % alignof(std::int64_t) == 0;
    if (bytes_.size() % sizeof(std::int64_t) != 0 || !aligned) {
      throw std::invalid_argument("keep must be an array of int64");
    }
  }
  const std::int64_t* data() const { return reinterpret_cast<const std::int64_t*>(bytes_.data()); }
  std::size_t size() const { return bytes_.size() / sizeof(std::int64_t); }

 private:
  Bytes bytes_;
};

void check_source(const Bytes& source, const Selection& selection) {
  if (source.size() != selection.source_bytes()) {
    throw std::invalid_argument("expected a source of " + std::to_string(selection.source_bytes()) +
                                " bytes, got " + std::to_string(source.size()));
  }
}

void compact_buffer(const py::object& source, const py::object& out, std::size_t rows,
                    std::size_t columns, std::size_t item_bytes, int axis, const py::object& keep,
                    unsigned threads, bool portable) {
  const Indices kept(keep);
  const Bytes from(source, false), to(out, true);
  const py::gil_scoped_release release;
  const Selection selection(axis, rows, columns, item_bytes, kept.data(), kept.size(),
                            piece_bytes_for(threads), portable);
  check_source(from, selection);
  if (to.size() < selection.kept_bytes()) {
    throw std::invalid_argument("expected room for " + std::to_string(selection.kept_bytes()) +
                                " bytes, got " + std::to_string(to.size()));
  }
  const bool apart = from.data() + from.size() <= to.data() || to.data() + to.size() <= from.data();
  if (from.data() != to.data() && !apart) {
    throw std::invalid_argument("out must be the source itself or not overlap it");
  }
  compact(selection, from.data(), to.data(), threads);
}

bool write_buffer(int file, std::uint64_t offset, const py::object& source, std::size_t rows,
                  std::size_t columns, std::size_t item_bytes, std::uint64_t exponent, int axis,
                  const py::object& keep) {
  const Destination to{file, offset, item_bytes, exponent};
  const Bytes from(source, false);
  if (keep.is_none()) {
    const py::gil_scoped_release release;
    return write(to, from.data(), from.size());
  }
  const Indices kept(keep);
  const py::gil_scoped_release release;
  const Selection selection(axis, rows, columns, item_bytes, kept.data(), kept.size(), kWriteBytes);
  check_source(from, selection);
  return write(to, from.data(), selection);
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Kernels on a CPU; compaction of weights in memory and on their way to a file.";
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      errno = error.code().value();
      PyErr_SetFromErrno(PyExc_OSError);
    }
  });
  bind_kernels(module);
  module.def("instructions", &instructions);
  module.def("compact", &compact_buffer, py::arg("source"), py::arg("out"), py::kw_only(),
             py::arg("rows"), py::arg("columns"), py::arg("item_bytes"), py::arg("axis"),
             py::arg("keep"), py::arg("threads"), py::arg("portable") = false);
  module.def("write", &write_buffer, py::arg("file"), py::arg("offset"), py::arg("source"),
             py::kw_only(), py::arg("rows"), py::arg("columns"), py::arg("item_bytes"),
             py::arg("exponent"), py::arg("axis") = 0, py::arg("keep") = py::none());
}
