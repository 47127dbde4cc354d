// hfprune_fast._C: translates types and errors, nothing else. Its signatures are in _C.pyi.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <cerrno>
#include <filesystem>
#include <optional>
#include <system_error>

#include "compact.h"
#include "safetensors.h"

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

void compact_buffer(const py::object& source, const py::object& out, std::size_t rows,
                    std::size_t columns, std::size_t item_bytes, int axis, const py::object& keep,
                    unsigned threads, bool portable) {
  const Indices kept(keep);
  const Bytes from(source, false), to(out, true);
  {
    const py::gil_scoped_release release;
    const std::size_t piece = piece_bytes_for(threads);
    if (axis != 0 && axis != 1) throw std::invalid_argument("axis must be 0 or 1");
    std::size_t row_bytes = 0;
    if (__builtin_mul_overflow(columns, item_bytes, &row_bytes)) {
      throw std::invalid_argument("a row is larger than memory");
    }
    const Selection selection =
        axis == 0 ? Selection::of_rows(rows, row_bytes, kept.data(), kept.size(), piece, portable)
                  : Selection::of_columns(rows, columns, item_bytes, kept.data(), kept.size(),
                                          piece, portable);
    if (from.size() != selection.source_bytes() || to.size() < selection.kept_bytes()) {
      throw std::invalid_argument(
          "expected a source of " + std::to_string(selection.source_bytes()) +
          " bytes and room for " + std::to_string(selection.kept_bytes()) + ", got " +
          std::to_string(from.size()) + " and " + std::to_string(to.size()));
    }
    const bool apart =
        from.data() + from.size() <= to.data() || to.data() + to.size() <= from.data();
    if (from.data() != to.data() && !apart) {
      throw std::invalid_argument("out must be the source itself or not overlap it");
    }
    compact(selection, from.data(), to.data(), threads);
  }
}

py::dict tensors_of(const MappedFile& file) {
  py::dict result;
  for (const TensorInfo& tensor : file.header().tensors) {
    result[py::str(tensor.name)] =
        py::make_tuple(tensor.dtype, py::tuple(py::cast(tensor.shape)), tensor.begin, tensor.end);
  }
  return result;
}

std::unique_ptr<Writer> make_writer(
    const std::filesystem::path& path, const Metadata& metadata,
    const std::vector<std::tuple<std::string, std::string, std::vector<std::uint64_t>>>& tensors) {
  std::vector<TensorInfo> infos;
  for (const auto& [name, dtype, shape] : tensors) infos.push_back({name, dtype, shape, 0, 0});
  const py::gil_scoped_release release;
  return std::make_unique<Writer>(path.string(), metadata, std::move(infos));
}

bool write_tensor(Writer& writer, const std::string& name, const py::object& source, int axis,
                  const py::object& keep) {
  const Bytes from(source, false);
  if (keep.is_none()) {
    const py::gil_scoped_release release;
    return writer.write(name, from.data(), from.size());
  }
  const Indices kept(keep);
  const py::gil_scoped_release release;
  return writer.write(name, from.data(), from.size(), axis, kept.data(), kept.size());
}

void translate_system_error(const std::system_error& error) {
  // what() is "PATH: reason"; OSError(errno, reason, path) becomes PermissionError and the like.
  const std::string reason = error.code().message(), text = error.what();
  const std::size_t path_bytes = text.size() - std::min(text.size(), reason.size() + 2);
  const py::object path = py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(text.data(), static_cast<Py_ssize_t>(path_bytes)));
  const py::object value = py::handle(PyExc_OSError)(error.code().value(), reason, path);
  PyErr_SetObject(reinterpret_cast<PyObject*>(Py_TYPE(value.ptr())), value.ptr());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compaction of weights, and safetensors files, in C++.";
  py::register_exception<Malformed>(module, "MalformedError", PyExc_ValueError);
  py::register_exception_translator([](std::exception_ptr pointer) {
    try {
      if (pointer) std::rethrow_exception(pointer);
    } catch (const std::system_error& error) {
      translate_system_error(error);
    }
  });

  module.def("instructions", &instructions);
  module.def("compact", &compact_buffer, py::arg("source"), py::arg("out"), py::kw_only(),
             py::arg("rows"), py::arg("columns"), py::arg("item_bytes"), py::arg("axis"),
             py::arg("keep"), py::arg("threads"), py::arg("portable") = false);

  py::class_<MappedFile>(module, "MappedFile", py::buffer_protocol())
      .def(py::init([](const std::filesystem::path& path) {
             const py::gil_scoped_release release;
             return std::make_unique<MappedFile>(path.string());
           }),
           py::arg("path"))
      .def_property_readonly("metadata",
                             [](const MappedFile& file) { return file.header().metadata; })
      .def_property_readonly("tensors", &tensors_of)
      .def("will_need", &MappedFile::will_need, py::arg("begin"), py::arg("end"))
      .def("done_with", &MappedFile::done_with, py::arg("begin"), py::arg("end"))
      .def_buffer([](const MappedFile& file) {
        return py::buffer_info(file.data(), static_cast<py::ssize_t>(file.bytes()));
      });

  py::class_<Writer>(module, "Writer")
      .def(py::init(&make_writer), py::arg("path"), py::arg("metadata"), py::arg("tensors"))
      .def("write", &write_tensor, py::arg("name"), py::arg("source"), py::arg("axis") = 0,
           py::arg("keep") = py::none())
      .def("close", &Writer::close, py::call_guard<py::gil_scoped_release>())
      .def("discard", &Writer::discard);
}
