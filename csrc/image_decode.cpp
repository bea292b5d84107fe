#include "image_decode.h"

#include <algorithm>
#include <cmath>
#include <csetjmp>
#include <cstdio>  // jpeglib.h needs FILE
#include <cstring>
#include <exception>
#include <vector>

#include <jpeglib.h>

#include <jerror.h>

#include "jpeg_orientation.h"
#include "resample.h"

namespace vpgtrans {
namespace {

// A crafted progressive file can ask for any number of passes over a large image.
constexpr int kMaxScans = 500;
constexpr std::int64_t kMaxScannedPixels = std::int64_t{1} << 32;

constexpr int kMaxPaddingBytes = 16;

// Columns beside the crop that are decoded too: smooth chroma upsampling looks one chroma sample to each side.
constexpr std::int64_t kColumnMargin = 8;

DecodeCode code_of_error(int message) {
  switch (message) {
    case JERR_NO_SOI:
      return DecodeCode::kNotAnImage;
    case JERR_INPUT_EMPTY:
    case JERR_INPUT_EOF:
    case JWRN_JPEG_EOF:
      return DecodeCode::kTruncated;
    case JERR_IMAGE_TOO_BIG:
      return DecodeCode::kTooManyPixels;
    case JERR_OUT_OF_MEMORY:
      return DecodeCode::kOutOfMemory;
    case JERR_ARITH_NOTIMPL:
    case JERR_BAD_PRECISION:
    case JERR_CONVERSION_NOTIMPL:
    case JERR_NOT_COMPILED:
    case JERR_SOF_UNSUPPORTED:
      return DecodeCode::kNeedsPillow;
    default:
      return DecodeCode::kUnreadable;
  }
}

// libjpeg's state, and where its errors go: back to the setjmp of decode_rows, with `code` set.
struct JpegReader {
  jpeg_decompress_struct info{};
  jpeg_error_mgr errors{};
  jpeg_progress_mgr progress{};
  std::jmp_buf failure;
  DecodeCode code = DecodeCode::kOk;
  bool in_scan = false;

  JpegReader() {
    // Filled here, not by jpeg_std_error, which names stderr: the only thing in Debian's libjpeg.a that keeps it out of
    // a module.
    info.err = &errors;
    errors.format_message = [](j_common_ptr, char* text) { text[0] = 0; };
    errors.reset_error_mgr = [](j_common_ptr common) {
      common->err->num_warnings = 0;
      common->err->msg_code = 0;
    };
    errors.error_exit = [](j_common_ptr common) { of(common).fail(code_of_error(common->err->msg_code)); };
    errors.emit_message = [](j_common_ptr common, int level) {
      if (level < 0) of(common).warned(common->err->msg_code);
    };
    errors.output_message = [](j_common_ptr) {};
    progress.progress_monitor = [](j_common_ptr common) { of(common).check_scans(); };
    info.client_data = this;
  }
  ~JpegReader() { jpeg_destroy_decompress(&info); }  // does nothing where nothing was created
  JpegReader(const JpegReader&) = delete;
  JpegReader& operator=(const JpegReader&) = delete;

  [[noreturn]] void fail(DecodeCode reason) {
    code = reason;
    std::longjmp(failure, 1);
  }

 private:
  static JpegReader& of(j_common_ptr common) { return *static_cast<JpegReader*>(common->client_data); }

  // libjpeg goes on after a warning, with pixels it made up; only what cannot touch pixels is let pass.
  void warned(int message) {
    const bool harmless = message == JWRN_ADOBE_XFORM || message == JWRN_JFIF_MAJOR || message == JWRN_BOGUS_ICC ||
                          (message == JWRN_EXTRANEOUS_DATA && is_padding(errors.msg_parm.i[0], errors.msg_parm.i[1]));
    if (!harmless) fail(code_of_error(message));
  }

  // Bytes too many are harmless between segments. Behind the entropy-coded data they mean that decoding lost its way,
  // unless they are the few that some cameras write there.
  bool is_padding(int byte_count, int next_marker) const {
    const bool restart = next_marker >= 0xd0 && next_marker <= 0xd7;
    return !in_scan || (!restart && byte_count <= kMaxPaddingBytes);
  }

  void check_scans() {
    const std::int64_t scans = info.input_scan_number;
    const std::int64_t pixels = static_cast<std::int64_t>(info.image_width) * info.image_height;
    if (scans > kMaxScans || scans * pixels > kMaxScannedPixels) fail(DecodeCode::kUnreadable);
  }
};

// Everything a thread keeps from image to image.
struct Scratch {
  FilterTable across, down;
  std::vector<std::uint8_t> decoded;    // rows as libjpeg gives them, a ring where they are filtered vertically first
  std::vector<std::uint8_t> once;       // rows filtered in one direction, a ring where that was horizontally
  std::vector<std::uint8_t> finished;   // kRowsAtOnce output rows
  std::vector<const std::uint8_t*> sum;  // rows that one output row is the weighted sum of

  // A huge image must not hold its memory for ever.
  void trim() {
    constexpr std::size_t kKeepBytes = std::size_t{4} << 20;
    for (std::vector<std::uint8_t>* buffer : {&decoded, &once})
      if (buffer->capacity() > kKeepBytes) std::vector<std::uint8_t>().swap(*buffer);
    for (FilterTable* table : {&across, &down})
      if (table->weight.capacity() * sizeof(std::int32_t) > kKeepBytes) *table = FilterTable();
  }
};

// Part of the decoded image, in its pixels after scaling: columns and rows, and the box inside them.
struct Region {
  int column, row, columns, rows;
  float left, top, right, bottom;  // of the box, relative to (column, row)
};

// Rows of a fixed number of bytes, numbered from 0 on, of which the last `row_count` are kept.
struct RowRing {
  std::uint8_t* data = nullptr;
  std::size_t stride = 0;
  int row_count = 0;

  void place(std::vector<std::uint8_t>& buffer, std::size_t row_bytes, int rows) {
    stride = row_bytes + kRowSlack;
    row_count = rows;
    // One row more, for what nobody reads.
    const std::size_t bytes = (static_cast<std::size_t>(rows) + 1) * stride;
    if (buffer.size() < bytes) buffer.resize(bytes);
    data = buffer.data();
  }
  std::uint8_t* row(int i) const { return data + static_cast<std::size_t>(i % row_count) * stride; }
  std::uint8_t* spare() const { return data + static_cast<std::size_t>(row_count) * stride; }
};

// Takes decoded rows, up to kRowsAtOnce at a time, and writes finished ones.
class SquareWriter {
 public:
  SquareWriter(const DecodeOptions& options, void* target, Scratch& scratch)
      : options_(options), target_(static_cast<std::uint8_t*>(target)), scratch_(scratch) {}

  // Decoded rows have `decoded_row_bytes` bytes; the region begins `offset` bytes into them.
  void start(const Region& region, bool flip, std::size_t decoded_row_bytes, std::size_t offset) {
    const int size = options_.size;
    const std::size_t finished_bytes = 3 * static_cast<std::size_t>(size);
    using Use = FilterTable::Use;
    scratch_.across.build(region.columns, region.left, region.right, size, flip ? Use::kMirroredRows : Use::kRows);
    scratch_.down.build(region.rows, region.top, region.bottom, size, Use::kColumns);
    const int most_rows = *std::max_element(scratch_.down.count.begin(), scratch_.down.count.end());
    scratch_.sum.resize(static_cast<std::size_t>(most_rows));
    // Pillow's condition.
    down_first_ = options_.tall_down_first && region.rows > size && region.rows - size > 2 * (region.columns - size);
    const int ring_rows = most_rows + kRowsAtOnce;
    decoded_.place(scratch_.decoded, decoded_row_bytes, down_first_ ? ring_rows : kRowsAtOnce);
    region_bytes_ = 3 * static_cast<std::size_t>(region.columns);
    once_.place(scratch_.once, down_first_ ? region_bytes_ : finished_bytes, down_first_ ? kRowsAtOnce : ring_rows);
    finished_.place(scratch_.finished, finished_bytes, kRowsAtOnce);
    offset_ = offset;
    rows_ = written_ = 0;
  }

  // Where the decoded row `i` rows after those taken so far goes.
  std::uint8_t* decoded_row(int i) const { return decoded_.row(rows_ + i); }

  bool complete() const { return written_ == options_.size; }

  void take(int count) {
    if (!down_first_) filter_across(decoded_, rows_, count, once_, rows_);
    rows_ += count;
    while (!complete() && ready(written_)) {
      if (down_first_)
        finish_down_first();
      else
        finish_across_first();
    }
  }

 private:
  bool ready(int y) const { return scratch_.down.first[y] + scratch_.down.count[y] <= rows_; }

  void finish_across_first() {
    filter_down(once_, 0, written_, 3 * static_cast<std::size_t>(options_.size), finished_.row(0));
    write(finished_.row(0));
  }

  void finish_down_first() {
    int count = 0;
    for (; count < kRowsAtOnce && written_ + count < options_.size && ready(written_ + count); ++count)
      filter_down(decoded_, offset_, written_ + count, region_bytes_, once_.row(count));
    filter_across(once_, 0, count, finished_, 0);
    for (int i = 0; i < count; ++i) write(finished_.row(i));
  }

  void filter_across(const RowRing& from, int from_row, int count, const RowRing& to, int to_row) const {
    const std::size_t offset = down_first_ ? 0 : offset_;
    const std::uint8_t* source[kRowsAtOnce];
    std::uint8_t* target[kRowsAtOnce];
    for (int i = 0; i < kRowsAtOnce; ++i) {
      source[i] = from.row(from_row + std::min(i, count - 1)) + offset;
      target[i] = i < count ? to.row(to_row + i) : to.spare();
    }
    filter_rows(scratch_.across, source, target, options_.vector);
  }

  void filter_down(const RowRing& from, std::size_t offset, int y, std::size_t bytes, std::uint8_t* target) const {
    for (int k = 0; k < scratch_.down.count[y]; ++k)
      scratch_.sum[static_cast<std::size_t>(k)] = from.row(scratch_.down.first[y] + k) + offset;
    filter_columns(scratch_.down, y, scratch_.sum.data(), bytes, target, options_.vector);
  }

  void write(const std::uint8_t* row) {
    const std::size_t values = 3 * static_cast<std::size_t>(options_.size);
    std::uint8_t* place = target_ + static_cast<std::size_t>(written_++) * values * options_.element_bytes;
    if (options_.element_bytes == 1)
      std::memcpy(place, row, values);
    else if (options_.element_bytes == 2)
      look_up(row, reinterpret_cast<std::uint16_t*>(place));
    else
      look_up(row, reinterpret_cast<std::uint32_t*>(place));
  }

  template <typename Element>
  void look_up(const std::uint8_t* row, Element* place) const {
    const auto* table = static_cast<const Element*>(options_.value_table);
    for (int x = 0; x < options_.size; ++x, row += 3, place += 3) {
      place[0] = table[row[0]];
      place[1] = table[256 + row[1]];
      place[2] = table[512 + row[2]];
    }
  }

  const DecodeOptions& options_;
  std::uint8_t* target_;
  Scratch& scratch_;
  RowRing decoded_, once_, finished_;
  std::size_t offset_ = 0, region_bytes_ = 0;
  bool down_first_ = false;
  int rows_ = 0;     // decoded rows taken so far
  int written_ = 0;  // output rows
};

// 1, 2, 4 or 8: the crop, divided by it, is still at least `size` on both sides.
int scale_divisor(int width, int height, int size) {
  int divisor = 1;
  while (divisor < 8 && std::min(width, height) / (2 * divisor) >= size) divisor *= 2;
  return divisor;
}

Region region_of(const DecodeRequest& box, int divisor) {
  const auto scaled = [divisor](std::int32_t pixels) { return static_cast<double>(pixels) / divisor; };
  const double left = scaled(box.left), right = scaled(box.left + box.width);
  const double top = scaled(box.top), bottom = scaled(box.top + box.height);
  Region region;
  region.column = static_cast<int>(left);
  region.row = static_cast<int>(top);
  region.columns = static_cast<int>(std::ceil(right)) - region.column;
  region.rows = static_cast<int>(std::ceil(bottom)) - region.row;
  region.left = static_cast<float>(left - region.column);
  region.right = static_cast<float>(right - region.column);
  region.top = static_cast<float>(top - region.row);
  region.bottom = static_cast<float>(bottom - region.row);
  return region;
}

bool has_end_marker_near_end(const std::uint8_t* data, std::size_t byte_count) {
  constexpr std::size_t kTail = 4096;
  const std::size_t start = byte_count > kTail ? byte_count - kTail : 0;
  for (std::size_t i = byte_count - 1; i > start; --i)
    if (data[i] == 0xd9 && data[i - 1] == 0xff) return true;
  return false;
}

// Limits and box of an image of that size; `box` becomes the whole image where it asks for that.
DecodeCode check_header(std::int32_t width, std::int32_t height, const DecodeOptions& options, DecodeRequest& box) {
  if (static_cast<std::int64_t>(width) * height > options.max_pixels) return DecodeCode::kTooManyPixels;
  if (box.left == 0 && box.top == 0 && box.width == 0 && box.height == 0) {
    box.width = width;
    box.height = height;
  }
  const bool inside = box.left >= 0 && box.top >= 0 && box.width > 0 && box.height > 0 && box.left < width &&
                      box.top < height && box.width <= width - box.left && box.height <= height - box.top;
  return inside ? DecodeCode::kOk : DecodeCode::kBoxOutside;
}

// Decodes columns as far as the region needs them; returns where it begins in the decoded rows, in bytes.
std::size_t crop_columns(jpeg_decompress_struct& info, const Region& region) {
  const std::int64_t begin = std::max<std::int64_t>(0, region.column - kColumnMargin);
  const std::int64_t end =
      std::min<std::int64_t>(info.output_width, std::int64_t{region.column} + region.columns + kColumnMargin);
  if (begin == 0 && end == info.output_width) return 3 * static_cast<std::size_t>(region.column);
  auto offset = static_cast<JDIMENSION>(begin);
  auto width = static_cast<JDIMENSION>(end - begin);
  jpeg_crop_scanline(&info, &offset, &width);
  return 3 * static_cast<std::size_t>(region.column - offset);
}

void skip_rows(jpeg_decompress_struct& info, JDIMENSION count) {
  if (count > 0) jpeg_skip_scanlines(&info, count);
}

// Entropy-decodes what is left, up to the end-of-image marker, and sees whether it ends there.
void check_rest(JpegReader& reader) {
  jpeg_decompress_struct& info = reader.info;
  if (info.output_scanline < info.output_height) {
    // The last row is read: skipping to the very end looks at no data.
    skip_rows(info, info.output_height - 1 - info.output_scanline);
    const auto row_bytes = info.output_width * static_cast<JDIMENSION>(info.output_components);
    JSAMPARRAY row = info.mem->alloc_sarray(reinterpret_cast<j_common_ptr>(&info), JPOOL_IMAGE, row_bytes, 1);
    if (jpeg_read_scanlines(&info, row, 1) == 0) reader.fail(DecodeCode::kUnreadable);
  }
  jpeg_finish_decompress(&info);
}

// libjpeg leaves this function and what it calls by longjmp: no object with a destructor may live in their frames
// while libjpeg runs.
void decode_rows(JpegReader& reader, DecodeRequest& request, const DecodeOptions& options, SquareWriter& writer) {
  jpeg_decompress_struct& info = reader.info;
  if (setjmp(reader.failure)) return;
  jpeg_create_decompress(&info);
  info.client_data = &reader;
  info.progress = &reader.progress;
  jpeg_mem_src(&info, const_cast<unsigned char*>(request.data), static_cast<unsigned long>(request.byte_count));
  jpeg_read_header(&info, TRUE);
  const bool rgb = info.jpeg_color_space == JCS_YCbCr || info.jpeg_color_space == JCS_RGB ||
                   info.jpeg_color_space == JCS_GRAYSCALE;
  const bool for_pillow = !rgb || may_be_rotated(request.data, request.byte_count);
  // Of a rotated image the box is in upright pixels: Pillow's to check.
  const DecodeCode verdict = check_header(
      static_cast<std::int32_t>(info.image_width), static_cast<std::int32_t>(info.image_height), options, request);
  if (verdict != DecodeCode::kOk && !(for_pillow && verdict == DecodeCode::kBoxOutside)) reader.fail(verdict);

  const int divisor = options.fast ? scale_divisor(request.width, request.height, options.size) : 1;
  info.out_color_space = rgb ? JCS_RGB : info.jpeg_color_space;
  info.dct_method = JDCT_ISLOW;
  info.do_fancy_upsampling = TRUE;
  info.scale_num = 1;
  info.scale_denom = static_cast<unsigned>(divisor);
  reader.in_scan = true;
  jpeg_start_decompress(&info);
  if (for_pillow) {
    check_rest(reader);
    reader.fail(DecodeCode::kNeedsPillow);
  }

  const Region region = region_of(request, divisor);
  const std::size_t offset = crop_columns(info, region);
  writer.start(region, request.flip, 3 * static_cast<std::size_t>(info.output_width), offset);
  skip_rows(info, static_cast<JDIMENSION>(region.row));
  const auto end = static_cast<JDIMENSION>(region.row + region.rows);
  while (!writer.complete()) {
    int count = 0;
    while (count < kRowsAtOnce && info.output_scanline < end) {
      JSAMPROW rows[kRowsAtOnce];
      for (int i = count; i < kRowsAtOnce; ++i) rows[i] = writer.decoded_row(i);
      const JDIMENSION wanted = std::min<JDIMENSION>(kRowsAtOnce - count, end - info.output_scanline);
      const JDIMENSION got = jpeg_read_scanlines(&info, rows + count, wanted);
      if (got == 0) reader.fail(DecodeCode::kUnreadable);
      count += static_cast<int>(got);
    }
    if (count == 0) reader.fail(DecodeCode::kUnreadable);
    writer.take(count);
  }
  if (info.output_scanline == info.output_height || !has_end_marker_near_end(request.data, request.byte_count))
    check_rest(reader);
}

// The same for an image whose pixels are stored; its rows are copied to where decoded ones would be.
DecodeCode read_rows(DecodeRequest& request, const DecodeOptions& options, SquareWriter& writer) {
  const std::int64_t width = request.raw_width, height = request.raw_height;
  const DecodeCode verdict = check_header(request.raw_width, request.raw_height, options, request);
  if (verdict == DecodeCode::kTooManyPixels) return verdict;
  if (height < 1 || request.byte_count != static_cast<std::uint64_t>(3 * width * height)) return DecodeCode::kUnreadable;
  if (verdict != DecodeCode::kOk) return verdict;
  const Region region = region_of(request, 1);
  const std::size_t row_bytes = 3 * static_cast<std::size_t>(region.columns);
  writer.start(region, request.flip, row_bytes, 0);
  for (int row = 0; row < region.rows && !writer.complete();) {
    const int count = std::min(kRowsAtOnce, region.rows - row);
    for (int i = 0; i < count; ++i, ++row) {
      const std::size_t pixel = static_cast<std::size_t>(region.row + row) * static_cast<std::size_t>(width) +
                                static_cast<std::size_t>(region.column);
      std::memcpy(writer.decoded_row(i), request.data + 3 * pixel, row_bytes);
    }
    writer.take(count);
  }
  return DecodeCode::kOk;
}

}  // namespace

#define VPGTRANS_TEXT(x) #x
#define VPGTRANS_TEXT_OF(x) VPGTRANS_TEXT(x)
const char* jpeg_version() { return VPGTRANS_TEXT_OF(LIBJPEG_TURBO_VERSION); }

DecodeCode decode_image(const DecodeRequest& request, const DecodeOptions& options, void* target) noexcept {
  static thread_local Scratch scratch;
  DecodeCode code = DecodeCode::kOk;
  if (request.byte_count == 0) {
    code = DecodeCode::kEmpty;
  } else if (request.raw_width == 0 &&
             (request.byte_count < 3 || std::memcmp(request.data, "\xff\xd8\xff", 3) != 0)) {
    code = DecodeCode::kNotAnImage;
  } else {
    try {
      DecodeRequest box = request;
      SquareWriter writer(options, target, scratch);
      if (request.raw_width > 0) {
        code = read_rows(box, options, writer);
      } else {
        JpegReader reader;
        decode_rows(reader, box, options, writer);
        code = reader.code;
      }
    } catch (const std::exception&) {  // of allocations only
      code = DecodeCode::kOutOfMemory;
    }
    scratch.trim();
  }
  if (code != DecodeCode::kOk)
    std::memset(target, 0, 3 * static_cast<std::size_t>(options.size) * options.size * options.element_bytes);
  return code;
}

}  // namespace vpgtrans
