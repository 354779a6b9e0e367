#pragma once
#include <cstdint>

namespace pds {

// Asks for pages of 2 MB where memory that will be written has none yet. Advice only.
void use_huge_pages(void* data, int64_t bytes);

}  // namespace pds
