// The bindings of the kernels; like bindings.cpp they translate types, and nothing else.
#pragma once

#include <pybind11/pybind11.h>

namespace hfprune {

void bind_kernels(pybind11::module_& module);

}  // namespace hfprune
