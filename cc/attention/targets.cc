#include "cc/attention/targets.h"

#include <strings.h>

#include <atomic>
#include <cstdlib>
#include <string>
#include <vector>

namespace continual_transformers {
namespace {

// The target in use. At first it is the choice of CONTINUAL_TRANSFORMERS_TARGET, read when the
// library is loaded.
struct Choice {
  std::atomic<Target> in_use;
  std::string error;

  Choice() : in_use(AvailableTargets().front()) {
    const char* name = std::getenv("CONTINUAL_TRANSFORMERS_TARGET");
    if (name != nullptr) error = Use(name);
    if (!error.empty()) error = "CONTINUAL_TRANSFORMERS_TARGET: " + error;
  }

  std::string Use(const std::string& name) {
    std::string names;
    for (const Target target : AvailableTargets()) {
      if (name.empty() || strcasecmp(name.c_str(), NameOf(target)) == 0) {
        in_use = target;
        return "";
      }
      names += (names.empty() ? "" : ", ") + std::string(NameOf(target));
    }
    return "expected one of the targets that are compiled in and that this processor has, " +
           names + ", but got " + name;
  }
};

Choice& TheChoice() {
  static Choice choice;
  return choice;
}

}  // namespace

std::vector<Target> AvailableTargets() {
  std::vector<Target> available;
#if defined(__x86_64__)
  const auto supports = [](auto... has) { return (has && ...); };
  if (supports(__builtin_cpu_supports("avx2"), __builtin_cpu_supports("fma"),
               __builtin_cpu_supports("bmi"), __builtin_cpu_supports("bmi2"),
               __builtin_cpu_supports("f16c"))) {
    if (supports(__builtin_cpu_supports("avx512f"), __builtin_cpu_supports("avx512bw"),
                 __builtin_cpu_supports("avx512cd"), __builtin_cpu_supports("avx512dq"),
                 __builtin_cpu_supports("avx512vl"))) {
      available.push_back(Target::kAvx3);
    }
    available.push_back(Target::kAvx2);
  }
  available.push_back(Target::kSse2);
#else
  available.push_back(Target::kNeon);
#endif
  return available;
}

Target TargetInUse() { return TheChoice().in_use.load(std::memory_order_relaxed); }

const char* NameOf(Target target) {
  switch (target) {
    case Target::kAvx3:
      return "AVX3";
    case Target::kAvx2:
      return "AVX2";
    case Target::kSse2:
      return "SSE2";
    case Target::kNeon:
      return "NEON";
  }
  return "";
}

std::string UseTarget(const std::string& name) { return TheChoice().Use(name); }

const std::string& TargetError() { return TheChoice().error; }

}  // namespace continual_transformers
