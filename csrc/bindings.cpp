// Python bindings of the compiled module vpgtrans.kernels._C. Knows NumPy arrays, never torch, so that a torch
// upgrade cannot break it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "row_packing.h"

namespace py = pybind11;

namespace {

template <typename Length>
py::array_t<std::int32_t> pack_rows(const py::array_t<Length, py::array::c_style>& lengths, std::int64_t budget) {
  if (lengths.ndim() != 1)
    throw std::invalid_argument("pack_rows: lengths has " + std::to_string(lengths.ndim()) +
                                " dimensions, expected 1");
  const auto item_count = static_cast<std::size_t>(lengths.size());
  py::array_t<std::int32_t> row_of_item(lengths.size());
  const Length* lengths_data = lengths.data();
  std::int32_t* row_of_item_data = row_of_item.mutable_data();
  {
    py::gil_scoped_release release;
    vpgtrans::pack_rows(lengths_data, item_count, budget, row_of_item_data);
  }
  return row_of_item;
}

py::dict build_info() {
  py::dict info;
  info["version"] = VPGTRANS_VERSION;
  info["compiler"] = VPGTRANS_COMPILER;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of vpgtrans.kernels; call it through the modules beside it.";
  // noconvert: another dtype is a TypeError here, never a silent copy with other values.
  module.def("pack_rows", &pack_rows<std::int32_t>, py::arg("lengths").noconvert(), py::arg("budget"));
  module.def("pack_rows", &pack_rows<std::int64_t>, py::arg("lengths").noconvert(), py::arg("budget"));
  module.def("build_info", &build_info, "Version, compiler, C++ standard and pybind11 this module was built with.");
}
