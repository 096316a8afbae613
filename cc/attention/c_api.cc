// What Python calls through ctypes, without TensorFlow: the instruction set that the kernels use.

#include <string>

#include "cc/attention/targets.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace continual_transformers {

EXPORTED const char* continual_transformers_target() { return NameOf(TargetInUse()); }

// Returns the names, fastest first, separated by commas.
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

}  // namespace continual_transformers
