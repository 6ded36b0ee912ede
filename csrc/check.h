// Argument checks that become Python's ValueError: M3AE_CHECK(ok, "rows must be ..., got ", value).
#pragma once

#include <sstream>
#include <stdexcept>

namespace m3ae {

template <class... Parts>
[[noreturn]] void value_error(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  throw std::invalid_argument(text.str());  // pybind11 turns it into ValueError
}

}  // namespace m3ae

#define M3AE_CHECK(condition, ...) \
  do {                             \
    if (!(condition)) ::m3ae::value_error(__VA_ARGS__); \
  } while (0)
