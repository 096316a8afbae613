// The driver's functions that cuda/ uses, and the contexts of two GPUs; see cuda_runtime.h.

#ifndef CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_H_
#define CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_H_

#include <atomic>
#include <vector>

enum CUresult {
  CUDA_SUCCESS = 0,
  CUDA_ERROR_INVALID_DEVICE = 101,
  CUDA_ERROR_INVALID_CONTEXT = 201
};
using CUdevice = int;
struct CUctx_st {
  int gpu;
};
using CUcontext = CUctx_st*;

namespace cuda_emulator {

constexpr int kGpus = 2;

// Bit n: whether GPU n has a context. It gets one with its first use, and keeps it.
inline std::atomic<int> contexts{0};
// The contexts that the thread has pushed. The last one is current; none or null: no context is.
inline thread_local std::vector<CUcontext> pushed;

inline CUcontext ContextOf(int gpu) {
  static CUctx_st each[kGpus] = {{0}, {1}};
  contexts |= 1 << gpu;
  return &each[gpu];
}
inline CUcontext CurrentOrNull() { return pushed.empty() ? nullptr : pushed.back(); }
inline void MakeCurrent(int gpu) {
  if (pushed.empty()) pushed.push_back(nullptr);
  pushed.back() = ContextOf(gpu);
}
// Most functions of the runtime need a context. Without one they take that of the first GPU.
inline void NeedContext() {
  if (CurrentOrNull() == nullptr) MakeCurrent(0);
}

}  // namespace cuda_emulator

inline CUresult cuDeviceGet(CUdevice* device, int ordinal) {
  if (ordinal < 0 || ordinal >= cuda_emulator::kGpus) return CUDA_ERROR_INVALID_DEVICE;
  return *device = ordinal, CUDA_SUCCESS;
}
inline CUresult cuDevicePrimaryCtxRetain(CUcontext* context, CUdevice device) {
  return *context = cuda_emulator::ContextOf(device), CUDA_SUCCESS;
}
inline CUresult cuCtxPushCurrent(CUcontext context) {
  return cuda_emulator::pushed.push_back(context), CUDA_SUCCESS;
}
inline CUresult cuCtxPopCurrent(CUcontext* context) {
  if (cuda_emulator::pushed.empty()) return CUDA_ERROR_INVALID_CONTEXT;
  *context = cuda_emulator::pushed.back();
  return cuda_emulator::pushed.pop_back(), CUDA_SUCCESS;
}

#endif  // CONTINUAL_TRANSFORMERS_TESTS_GPU_EMULATOR_CUDA_H_
