// Python bindings of the compiled module vpgtrans.kernels._C. Knows NumPy arrays, never torch, so that a torch
// upgrade cannot break it.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>

#include "row_packing.h"
#if VPGTRANS_JPEG
#include "image_decode.h"
#include "resample.h"
#include "worker_pool.h"
#endif

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

#if VPGTRANS_JPEG

template <typename Element>
using Array = py::array_t<Element, py::array::c_style>;

// Decodes image i of `byte_counts[i]` bytes at `addresses[i]` to `target` + i * size * size * 3 elements, and returns
// the codes. `value_table` has no elements where the output is uint8. `raw_sizes` holds width and height where pixels
// are stored and zeros for JPEGs, or nothing where all are.
py::array_t<std::int32_t> decode_images(const Array<std::uint64_t>& addresses, const Array<std::uint64_t>& byte_counts,
                                        const Array<std::int32_t>& boxes, const Array<bool>& flips, int size,
                                        std::uint64_t target, int element_bytes, const Array<std::uint8_t>& value_table,
                                        std::int64_t max_pixels, int threads, bool fast,
                                        bool tall_down_first, bool vector, const Array<std::int32_t>& raw_sizes) {
  const py::ssize_t count = addresses.size();
  if (byte_counts.size() != count || flips.size() != count || boxes.size() != 4 * count ||
      (raw_sizes.size() != 0 && raw_sizes.size() != 2 * count))
    throw std::invalid_argument(
        "decode_images: addresses, byte_counts, boxes, flips and raw_sizes differ in their number");
  if (size < 1 || size > vpgtrans::kMaxOutputSize)
    throw std::invalid_argument("decode_images: size is " + std::to_string(size) + ", expected 1.." +
                                std::to_string(vpgtrans::kMaxOutputSize));
  const bool has_table = element_bytes == 2 || element_bytes == 4;
  if ((!has_table && element_bytes != 1) || value_table.size() != (has_table ? 3 * 256 * element_bytes : 0))
    throw std::invalid_argument("decode_images: value_table has " + std::to_string(value_table.size()) +
                                " bytes, which do not fit elements of " + std::to_string(element_bytes));
  const vpgtrans::DecodeOptions options{
      size, element_bytes, has_table ? value_table.data() : nullptr, max_pixels, fast,
      tall_down_first, vector && vpgtrans::has_vector_code()};
  py::array_t<std::int32_t> codes(count);
  std::int32_t* code = codes.mutable_data();
  const std::uint64_t* address = addresses.data();
  const std::uint64_t* byte_count = byte_counts.data();
  const std::int32_t* box = boxes.data();
  const bool* flip = flips.data();
  const std::int32_t* raw_size = raw_sizes.size() != 0 ? raw_sizes.data() : nullptr;
  const std::uint64_t image_bytes = 3 * static_cast<std::uint64_t>(size) * size * element_bytes;
  {
    py::gil_scoped_release release;
    vpgtrans::for_each_item(static_cast<std::size_t>(count), threads, [=, &options](std::size_t i) {
      const vpgtrans::DecodeRequest request{reinterpret_cast<const std::uint8_t*>(address[i]),
                                            static_cast<std::size_t>(byte_count[i]),
                                            box[4 * i], box[4 * i + 1], box[4 * i + 2], box[4 * i + 3], flip[i],
                                            raw_size ? raw_size[2 * i] : 0, raw_size ? raw_size[2 * i + 1] : 0};
      code[i] = static_cast<std::int32_t>(
          vpgtrans::decode_image(request, options, reinterpret_cast<void*>(target + i * image_bytes)));
    });
  }
  return codes;
}

#endif

py::dict build_info() {
  py::dict info;
  info["version"] = VPGTRANS_VERSION;
  info["compiler"] = VPGTRANS_COMPILER;
  info["cxx_standard"] = static_cast<long>(__cplusplus);
  info["pybind11"] = PYBIND11_TOSTRING(PYBIND11_VERSION_MAJOR) "." PYBIND11_TOSTRING(PYBIND11_VERSION_MINOR);
#if VPGTRANS_JPEG
  info["libjpeg_turbo"] = vpgtrans::jpeg_version();
  info["vector_code"] = vpgtrans::has_vector_code() ? "AVX2" : "none";
#else
  info["libjpeg_turbo"] = "absent at build time";
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  module.doc() = "Compiled part of vpgtrans.kernels; call it through the modules beside it.";
  // noconvert: another dtype is a TypeError here, never a silent copy with other values.
  module.def("pack_rows", &pack_rows<std::int32_t>, py::arg("lengths").noconvert(), py::arg("budget"));
  module.def("pack_rows", &pack_rows<std::int64_t>, py::arg("lengths").noconvert(), py::arg("budget"));
#if VPGTRANS_JPEG
  module.def("decode_images", &decode_images, py::arg("addresses").noconvert(), py::arg("byte_counts").noconvert(),
             py::arg("boxes").noconvert(), py::arg("flips").noconvert(), py::arg("size"), py::arg("target"),
             py::arg("element_bytes"), py::arg("value_table").noconvert(), py::arg("max_pixels"), py::arg("threads"),
             py::arg("fast"), py::arg("tall_down_first"), py::arg("vector"),
             py::arg("raw_sizes").noconvert() = Array<std::int32_t>(0));
#endif
  module.def("build_info", &build_info, "Version, compiler, C++ standard and pybind11 this module was built with.");
}
