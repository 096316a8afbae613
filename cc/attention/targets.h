// The vector instruction sets ("targets") that the kernels are compiled for, and the one that this
// process uses. Each kernel is one source, compiled once per target with Google Highway. Include
// this header before any of Highway's.

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_TARGETS_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_TARGETS_H_

#include <string>
#include <vector>

// There is no Highway library to link with: TensorFlow's wheel has only its headers.
#ifndef HWY_HEADER_ONLY
#define HWY_HEADER_ONLY
#endif

// The targets left out would double the compile time and gain nothing. Next to AVX2 and AVX3, the
// others add instructions that no kernel uses, and no processor of this decade without AVX2 is
// faster with SSE4 than with SSE2.
#define HWY_DISABLED_TARGETS                                                                    \
  (HWY_SSSE3 | HWY_SSE4 | HWY_AVX3_DL | HWY_AVX3_ZEN4 | HWY_AVX3_SPR | HWY_AVX10_2 | HWY_NEON | \
   HWY_NEON_BF16 | HWY_SVE | HWY_SVE2 | HWY_SVE_256 | HWY_SVE2_128)

// Calls FUNCTION(...) as compiled for the target in use. Use it where HWY_ONCE is true.
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

// Unrolls a loop over an array of vectors, which are then kept in registers. Sanitizers need them
// in memory, and would compile the unrolled loops for a quarter of an hour.
#if defined(__SANITIZE_ADDRESS__) || defined(__SANITIZE_THREAD__)
#define CONTINUAL_TRANSFORMERS_UNROLL
#else
#define CONTINUAL_TRANSFORMERS_UNROLL HWY_UNROLL(8)
#endif

namespace continual_transformers {

// AVX3 is Highway's name for the AVX-512 of servers since 2017: F, BW, CD, DQ and VL.
enum class Target { kAvx3, kAvx2, kSse2, kNeon };

// The target of this process: the one that UseTarget was given last, or else that of the
// environment variable CONTINUAL_TRANSFORMERS_TARGET, or else the fastest that the processor has.
Target TargetInUse();

const char* NameOf(Target target);

// The targets that were compiled and that this processor has, fastest first.
std::vector<Target> AvailableTargets();

// Changes the target in use to the named one, in upper or lower case, or to the fastest for "".
// Must not be called while a kernel runs. Returns what is wrong with the name, or "".
std::string UseTarget(const std::string& name);

// Returns what is wrong with CONTINUAL_TRANSFORMERS_TARGET, or "".
const std::string& TargetError();

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_TARGETS_H_
