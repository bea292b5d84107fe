// Whether a JPEG says that it is stored rotated or mirrored.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vpgtrans {

// False only where it is certain that viewers show the pixels as they are stored: no EXIF or XMP orientation, or 1.
// True for every other orientation, for EXIF blocks that are damaged or that come in several parts, and where the
// segments before the first scan do not follow each other as they should.
bool may_be_rotated(const std::uint8_t* data, std::size_t byte_count);

}  // namespace vpgtrans
