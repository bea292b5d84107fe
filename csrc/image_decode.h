// JPEG bytes or stored pixels -> crop -> antialiased bicubic square -> flip -> interleaved output, one image at a time.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vpgtrans {

// Codes of kernels/image_decode.py's DecodeCode.
enum class DecodeCode : std::int32_t {
  kOk = 0,
  kEmpty = 1,           // no bytes
  kNotAnImage = 2,      // does not start as a JPEG
  kTruncated = 3,       // the data end before the image does
  kUnreadable = 4,      // damaged data
  kTooManyPixels = 5,   // more than the limit
  kBoxOutside = 6,      // the crop box is not inside the image
  kOutOfMemory = 7,
  kNeedsPillow = 8,     // CMYK, an EXIF rotation or a coding this libjpeg-turbo was built without
};

struct DecodeRequest {
  const std::uint8_t* data;
  std::size_t byte_count;
  // Crop box in pixels of the full image; width and height of 0 mean the whole image.
  std::int32_t left, top, width, height;
  bool flip;
  // Not 0: no JPEG but interleaved RGB pixels of this size, without padding between rows.
  std::int32_t raw_width = 0, raw_height = 0;
};

struct DecodeOptions {
  int size;                 // side of the output square, 1..kMaxOutputSize
  int element_bytes;        // of the output: 1 (pixels as they are), 2 or 4
  const void* value_table;  // [3, 256] elements of 2 or 4 bytes: what becomes of each level of each channel; else null
  std::int64_t max_pixels;
  bool fast;    // decode at 1/2, 1/4 or 1/8 where the crop stays at least as large as the output
  bool tall_down_first;  // as Pillow 13 does: filter columns first where the height shrinks by over twice as much
  bool vector;  // use the processor's vector code where there is any; the result is the same
};

constexpr int kMaxOutputSize = 8192;

// Writes [size, size, 3] elements to `target`: the image, or zero bytes where the code is not kOk. Never throws.
//
// The exact mode gives what Pillow gives: the decoded pixels are libjpeg-turbo's with the accurate integer DCT and
// smooth chroma upsampling, the resampling is resample.h's. Only what the crop needs is decoded, so damage below the
// crop goes unseen, unless the file has no end-of-image marker near its end: then everything is decoded to tell a file
// that was cut from one with bytes appended.
//
// `target` must be aligned to its elements.
DecodeCode decode_image(const DecodeRequest& request, const DecodeOptions& options, void* target) noexcept;

// Version of libjpeg-turbo this was compiled against.
const char* jpeg_version();

}  // namespace vpgtrans
