// The vector instruction sets ("targets") that the kernels are compiled for, and the one that this
// process uses. Each kernel is one source, compiled once per target with Google Highway; to be
// included before anything of Highway's.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_TARGETS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_TARGETS_H_

#include <string>
#include <vector>

// There is no library of Highway's to link with: TensorFlow's wheel has its headers only.
#ifndef HWY_HEADER_ONLY
#define HWY_HEADER_ONLY
#endif

// Those left out would take as long to compile again and gain nothing here: next to AVX2 and AVX3
// the others add instructions that no kernel has a use for, and no processor of this decade that
// lacks AVX2 is faster with SSE4 than with SSE2.
#define HWY_DISABLED_TARGETS                                                                    \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_AVX3_ZEN4 | HWY_AVX3_SPR | HWY_AVX10_2 | HWY_NEON | \
   HWY_NEON_BF16 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

// FUNCTION(...) as it was compiled for the target in use. To be used where HWY_ONCE is true.
#if defined(__x86_64__)
#define CONTINUAL_TRANSFORMERS_DISPATCH(FUNCTION, ...)                \
  switch (::continual_transformers::TargetInUse()) {                  \
    case ::continual_transformers::Target::kAvx3:                     \
      return ::continual_transformers::N_AVX3::FUNCTION(__VA_ARGS__); \
    case ::continual_transformers::Target::kAvx2:                     \
      return ::continual_transformers::N_AVX2::FUNCTION(__VA_ARGS__); \
    default:                                                          \
      return ::continual_transformers::N_SSE2::FUNCTION(__VA_ARGS__); \
  }
#elif defined(__aarch64__)
#define CONTINUAL_TRANSFORMERS_DISPATCH(FUNCTION, ...) \
  return ::continual_transformers::N_NEON_WITHOUT_AES::FUNCTION(__VA_ARGS__)
#else
#error "Expected x86-64 or AArch64, which are what TensorFlow's wheels are built for"
#endif

namespace continual_transformers {

// AVX3 is Highway's word for AVX-512 as servers have had it since 2017: F, BW, CD, DQ and VL.
enum class Target { kAvx3, kAvx2, kSse2, kNeon };

// What kernels of this process run on: the fastest that the processor has, or what the environment
// variable CONTINUAL_TRANSFORMERS_TARGET names, or what UseTarget was given last.
Target TargetInUse();

const char* NameOf(Target target);

// Those that were compiled and that this processor has, fastest first.
std::vector<Target> AvailableTargets();

// Changes the target in use to that of the name, in upper or lower case, or "" for the fastest; not
// while a kernel runs.
// Returns what is wrong with the name, or "" where nothing is.
std::string UseTarget(const std::string& name);

// What is wrong with CONTINUAL_TRANSFORMERS_TARGET, or "".
const std::string& TargetError();

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_TARGETS_H_
