#include "cc/tensorflow/gpu/cuda_status.h"

#include <string>

#include "absl/strings/str_cat.h"

#ifndef CONTINUAL_TRANSFORMERS_CUDA_BUILD
#error \
    "The build must define the version of CUDA and the GPUs as a string: see setup.py and bazel/."
#endif

namespace continual_transformers {
namespace {

constexpr char kBuild[] = "CUDA " CONTINUAL_TRANSFORMERS_CUDA_BUILD;
constexpr char kRebuild[] =
    "pip install --force-reinstall --no-deps --no-cache-dir .` in a checkout of "
    "continual-transformers-tf";

// Returns the architecture of the GPU in use as the build names it, such as "90"; "": unknown.
std::string Architecture() {
  int device, major, minor;
  if (cudaGetDevice(&device) != cudaSuccess ||
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess) {
    cudaGetLastError();
    return "";
  }
  return absl::StrCat(major, minor);
}

std::string NotBuiltForThisGpu() {
  const std::string architecture = Architecture();
  const std::string got = architecture.empty() ? "another" : absl::StrCat("sm_", architecture);
  const std::string wanted = architecture.empty() ? "NN" : architecture;
  return absl::StrCat("expected a GPU that the kernels were built for, ", kBuild, ", but got ", got,
                      ". To build for it: `CONTINUAL_TRANSFORMERS_CUDA_ARCHITECTURES=", wanted, " ",
                      kRebuild, ". Or set CONTINUAL_TRANSFORMERS_BACKEND=tensorflow.");
}

std::string DriverTooOld() {
  return absl::StrCat(
      "expected a driver that knows ", kBuild,
      ", but this one is older. Update it, or build with an older nvcc: `CUDA_HOME=... ", kRebuild,
      ". Or set CONTINUAL_TRANSFORMERS_BACKEND=tensorflow.");
}

}  // namespace

absl::Status CudaStatus(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return absl::OkStatus();
  cudaGetLastError();
  const std::string said =
      absl::StrCat(what, " failed: ", cudaGetErrorName(error), ", ", cudaGetErrorString(error));
  switch (error) {
    case cudaErrorNoKernelImageForDevice:
    case cudaErrorInvalidDeviceFunction:
    case cudaErrorInvalidKernelImage:
    case cudaErrorInvalidPtx:
    case cudaErrorJitCompilerNotFound:
      return absl::FailedPreconditionError(absl::StrCat(said, "; ", NotBuiltForThisGpu()));
    case cudaErrorInsufficientDriver:
    case cudaErrorUnsupportedPtxVersion:
      return absl::FailedPreconditionError(absl::StrCat(said, "; ", DriverTooOld()));
    case cudaErrorMemoryAllocation:
      return absl::ResourceExhaustedError(said);
    default:
      return absl::InternalError(said);
  }
}

}  // namespace continual_transformers
