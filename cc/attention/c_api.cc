// What Python asks of the library without TensorFlow, by ctypes: which instructions the kernels
// use, and how long a plain read takes.

#include <cstddef>
#include <string>

#include "cc/attention/read_loop.h"
#include "cc/attention/targets.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace continual_transformers {

EXPORTED const char* continual_transformers_target() { return NameOf(TargetInUse()); }

// Names, fastest first, with commas between them.
EXPORTED const char* continual_transformers_targets() {
  static const std::string names = [] {
    std::string joined;
    for (const Target target : AvailableTargets()) {
      joined += (joined.empty() ? "" : ",") + std::string(NameOf(target));
    }
    return joined;
  }();
  return names.c_str();
}

EXPORTED const char* continual_transformers_target_error() { return TargetError().c_str(); }

EXPORTED unsigned char continual_transformers_read(const void* data, size_t bytes) {
  return ReadLoop(data, bytes);
}

}  // namespace continual_transformers
