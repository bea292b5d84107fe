#include "jpeg_orientation.h"

#include <string_view>

namespace vpgtrans {
namespace {

using std::string_view_literals::operator""sv;

enum class Found { kNone, kUpright, kOther };

// A TIFF block in either byte order.
class TiffReader {
 public:
  explicit TiffReader(std::string_view block) : block_(block) {
    big_endian_ = block.substr(0, 2) == "MM"sv;
    valid_ = (big_endian_ || block.substr(0, 2) == "II"sv) && block.size() >= 8 && u16(2) == 42;
  }
  bool valid() const { return valid_; }
  bool holds(std::size_t offset, std::size_t bytes) const {
    return offset <= block_.size() && bytes <= block_.size() - offset;
  }
  std::uint32_t u16(std::size_t offset) const {
    const std::uint32_t a = byte(offset), b = byte(offset + 1);
    return big_endian_ ? a << 8 | b : b << 8 | a;
  }
  std::uint32_t u32(std::size_t offset) const {
    const std::uint32_t a = u16(offset), b = u16(offset + 2);
    return big_endian_ ? a << 16 | b : b << 16 | a;
  }

 private:
  std::uint32_t byte(std::size_t offset) const { return static_cast<unsigned char>(block_[offset]); }

  std::string_view block_;
  bool big_endian_ = false;
  bool valid_ = false;
};

Found orientation_in_exif(std::string_view block) {
  constexpr std::uint32_t kOrientation = 0x0112, kShort = 3;
  const TiffReader tiff(block);
  if (!tiff.valid()) return Found::kOther;
  const std::size_t directory = tiff.u32(4);
  if (!tiff.holds(directory, 2)) return Found::kOther;
  const std::size_t entries = tiff.u16(directory);
  if (!tiff.holds(directory + 2, 12 * entries)) return Found::kOther;
  Found found = Found::kNone;
  for (std::size_t i = 0; i < entries; ++i) {
    const std::size_t entry = directory + 2 + 12 * i;
    if (tiff.u16(entry) != kOrientation) continue;
    const bool plain = tiff.u16(entry + 2) == kShort && tiff.u32(entry + 4) == 1;
    if (!plain || tiff.u16(entry + 8) != 1) return Found::kOther;
    found = Found::kUpright;
  }
  return found;
}

Found orientation_in_xmp(std::string_view packet) {
  constexpr std::string_view kName = "tiff:Orientation"sv;
  for (std::size_t at = packet.find(kName); at != std::string_view::npos; at = packet.find(kName, at + kName.size())) {
    const std::string_view rest = packet.substr(at + kName.size());
    const bool closes = at > 0 && packet[at - 1] == '/';
    if (!closes && rest.substr(0, 3) != "=\"1"sv && rest.substr(0, 2) != ">1"sv) return Found::kOther;
  }
  return Found::kNone;
}

}  // namespace

bool may_be_rotated(const std::uint8_t* data, std::size_t byte_count) {
  constexpr std::uint8_t kApp1 = 0xe1, kStartOfScan = 0xda;
  const std::string_view file(reinterpret_cast<const char*>(data), byte_count);
  Found exif = Found::kNone, xmp = Found::kNone;
  bool exif_seen = false;
  std::size_t at = 2;
  while (at + 4 <= file.size() && data[at] == 0xff) {
    const std::uint8_t marker = data[at + 1];
    if (marker == kStartOfScan) return exif == Found::kOther || (exif == Found::kNone && xmp == Found::kOther);
    if (marker == 0xff) {  // a fill byte
      ++at;
      continue;
    }
    const std::size_t length = static_cast<std::size_t>(data[at + 2]) << 8 | data[at + 3];
    if (length < 2 || length > file.size() - at - 2) break;
    const std::string_view content = file.substr(at + 4, length - 2);
    if (marker == kApp1 && content.substr(0, 6) == "Exif\0\0"sv) {
      if (exif_seen) return true;
      exif_seen = true;
      exif = orientation_in_exif(content.substr(6));
    } else if (marker == kApp1 && content.substr(0, 29) == "http://ns.adobe.com/xap/1.0/\0"sv) {
      if (orientation_in_xmp(content) == Found::kOther) xmp = Found::kOther;
    }
    at += 2 + length;
  }
  return true;
}

}  // namespace vpgtrans
