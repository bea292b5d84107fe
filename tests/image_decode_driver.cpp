// Decodes the records of a file, for a build with sanitizers: image_decode_driver FILE [REPEATS]. Prints one code a line.
//
// A record: int32 byte count, left, top, width, height, size, flags (1 flip, 2 fast, 4 tall down first, 8 vector code);
// then the bytes. Input and output lie in allocations of their exact size, so that a sanitizer sees every step outside.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "../csrc/image_decode.h"
#include "../csrc/resample.h"
#include "../csrc/worker_pool.h"

namespace {

struct Record {
  std::int32_t box[4], size, flags;
  std::unique_ptr<std::uint8_t[]> data;
  std::size_t byte_count;
};

std::vector<Record> read_records(const char* name) {
  std::vector<Record> records;
  std::FILE* file = std::fopen(name, "rb");
  if (file == nullptr) std::abort();
  for (std::int32_t head[7]; std::fread(head, sizeof(head), 1, file) == 1;) {
    Record record;
    std::memcpy(record.box, head + 1, sizeof(record.box));
    record.size = head[5];
    record.flags = head[6];
    record.byte_count = static_cast<std::size_t>(head[0]);
    record.data.reset(new std::uint8_t[record.byte_count]);
    if (std::fread(record.data.get(), 1, record.byte_count, file) != record.byte_count) std::abort();
    records.push_back(std::move(record));
  }
  std::fclose(file);
  return records;
}

}  // namespace

int main(int argument_count, char** arguments) {
  if (argument_count < 2) return 2;
  const std::vector<Record> records = read_records(arguments[1]);
  const int repeats = argument_count > 2 ? std::atoi(arguments[2]) : 1;
  std::vector<vpgtrans::DecodeCode> codes(records.size());
  const std::vector<std::uint16_t> table(3 * 256, 1);
  for (int repeat = 0; repeat < repeats; ++repeat)
    vpgtrans::for_each_item(records.size(), repeats > 1 ? 1 : 3, [&](std::size_t i) {
      const Record& record = records[i];
      const int element_bytes = i % 2 == 0 ? 1 : 2;
      const vpgtrans::DecodeOptions options{record.size,
                                            element_bytes,
                                            element_bytes == 1 ? nullptr : table.data(),
                                            std::int64_t{1} << 22,
                                            (record.flags & 2) != 0,
                                            (record.flags & 4) != 0,
                                            (record.flags & 8) != 0 && vpgtrans::has_vector_code()};
      const std::size_t values = 3 * static_cast<std::size_t>(record.size) * static_cast<std::size_t>(record.size);
      const std::unique_ptr<std::uint16_t[]> wide(new std::uint16_t[element_bytes == 2 ? values : 0]);
      const std::unique_ptr<std::uint8_t[]> narrow(new std::uint8_t[element_bytes == 1 ? values : 0]);
      void* target = element_bytes == 1 ? static_cast<void*>(narrow.get()) : wide.get();
      const vpgtrans::DecodeRequest request{record.data.get(), record.byte_count, record.box[0],
                                            record.box[1],     record.box[2],     record.box[3],
                                            (record.flags & 1) != 0};
      codes[i] = vpgtrans::decode_image(request, options, target);
      // The same bytes as rows of 7 stored pixels, in an allocation of their size.
      vpgtrans::DecodeRequest raw = request;
      raw.raw_width = 7;
      raw.raw_height = static_cast<std::int32_t>(record.byte_count / 21);
      raw.byte_count = record.byte_count / 21 * 21;
      const std::unique_ptr<std::uint8_t[]> pixels(new std::uint8_t[raw.byte_count]);
      std::memcpy(pixels.get(), record.data.get(), raw.byte_count);
      raw.data = pixels.get();
      if (i % 3 != 0) raw.width = raw.left = 0, raw.top = raw.height = 0;
      vpgtrans::decode_image(raw, options, target);
    });
  for (const vpgtrans::DecodeCode code : codes) std::printf("%d\n", static_cast<int>(code));
}
