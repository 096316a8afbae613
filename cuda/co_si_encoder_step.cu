#include <cstdint>

#include "cc/attention/step_types.h"
#include "cuda/co_si_encoder_step.h"
#include "cuda/dense.h"
#include "cuda/launch.cuh"
#include "cuda/normalize.h"
#include "cuda/scratch.h"

namespace continual_transformers {
namespace {

template <typename T, typename C, typename W>
class Launcher {
 public:
  Launcher(const DeviceCoSiEncoderStep<T, C, W>& step, cudaStream_t stream)
      : step_(step),
        attention_(step.attention),
        stream_(stream),
        rows_(step.attention.attention.num_streams),
        features_(step.attention.query.inputs) {
    ScratchLayout layout(step.scratch);
    normal_ = layout.Take<T>(rows_ * features_);
    attended_ = layout.Take<T>(rows_ * features_);
    hidden_ = layout.Take<T>(rows_ * step.hidden_features);
    attention_.scratch = layout.Take<char>(attention_.ScratchBytes());
    bytes_ = layout.bytes();
    if (step.norm_first) {
      attention_.query.input = attention_.key.input = attention_.value.input = normal_;
    }
    attention_.residual = step.attention.query.input;
    attention_.result = step.result == nullptr ? nullptr : attended_;
  }

  int64_t bytes() const { return bytes_; }
  const char* Refusal() const {
    if (!HasActivation(step_.activation)) return "expected the activation linear, gelu or relu";
    return RefusesCoSiMhaStep(attention_);
  }

  cudaError_t Run() {
    if (rows_ == 0) return cudaSuccess;
    if (Refusal() != nullptr) return cudaErrorInvalidValue;
    overlap_ = attention_.may_overlap && CanOverlap();
    if (step_.norm_first) Normalize(step_.attention_norm, step_.attention.query.input, normal_);
    Try([&] { return LaunchCoSiMhaStep(attention_, stream_); });
    if (step_.result == nullptr) return error_;
    DeviceDenseParams<T, W> hidden = Layer(step_.hidden, normal_, step_.hidden_features, hidden_);
    hidden.layers[0].activation = step_.activation;
    hidden.norm =
        Norm(step_.norm_first ? step_.output_norm : step_.attention_norm, attended_, normal_);
    Try([&] { return LaunchDense(hidden, stream_); });
    DeviceDenseParams<T, W> output =
        Layer(step_.output, hidden_, features_, step_.norm_first ? step_.result : attended_);
    output.layers[0].residual = step_.norm_first ? attended_ : normal_;
    Try([&] { return LaunchDense(output, stream_); });
    if (!step_.norm_first) Normalize(step_.output_norm, attended_, step_.result);
    return error_;
  }

 private:
  // Does nothing after an error.
  template <typename F>
  void Try(const F& launch) {
    if (error_ == cudaSuccess) error_ = launch();
  }

  DeviceNormalizeParams<T> Norm(const LayerNorm<T>& norm, const T* x, T* y) const {
    return {norm, x, y, rows_, features_, overlap_};
  }

  void Normalize(const LayerNorm<T>& norm, const T* x, T* y) {
    Try([&] { return LaunchNormalize(Norm(norm, x, y), stream_); });
  }

  DeviceDenseParams<T, W> Layer(const Projection<T, W>& layer, const T* input, int64_t outputs,
                                T* output) const {
    DeviceDenseParams<T, W> dense = {};
    dense.layers[0] = DenseOf(layer, outputs, output);
    dense.layers[0].input = input;
    dense.num_layers = 1;
    dense.rows = rows_;
    dense.overlap = overlap_;
    return dense;
  }

  const DeviceCoSiEncoderStep<T, C, W>& step_;
  DeviceCoSiMhaStep<T, C, W> attention_;
  const cudaStream_t stream_;
  const int64_t rows_, features_;
  T *normal_, *attended_, *hidden_;
  int64_t bytes_;
  bool overlap_ = false;
  cudaError_t error_ = cudaSuccess;
};

}  // namespace

template <typename T, typename C, typename W>
int64_t DeviceCoSiEncoderStep<T, C, W>::ScratchBytes() const {
  return Launcher<T, C, W>(*this, nullptr).bytes();
}

template <typename T, typename C, typename W>
const char* RefusesCoSiEncoderStep(const DeviceCoSiEncoderStep<T, C, W>& step) {
  return Launcher<T, C, W>(step, nullptr).Refusal();
}

template <typename T, typename C, typename W>
cudaError_t LaunchCoSiEncoderStep(const DeviceCoSiEncoderStep<T, C, W>& step, cudaStream_t stream) {
  return Launcher<T, C, W>(step, stream).Run();
}

#define INSTANTIATE(T, C, W)                                                                   \
  template struct DeviceCoSiEncoderStep<T, C, W>;                                              \
  template const char* RefusesCoSiEncoderStep<T, C, W>(const DeviceCoSiEncoderStep<T, C, W>&); \
  template cudaError_t LaunchCoSiEncoderStep<T, C, W>(const DeviceCoSiEncoderStep<T, C, W>&,   \
                                                      cudaStream_t);
CONTINUAL_TRANSFORMERS_FOR_STEP_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
