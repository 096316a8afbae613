#include "cc/attention/co_si_encoder_step.h"

#include <algorithm>
#include <cstdint>
#include <memory>

#include "cc/attention/activations.h"
#include "cc/attention/dense.h"
#include "cc/attention/elementwise.h"
#include "cc/attention/step_types.h"

namespace continual_transformers {
namespace {

template <typename T, typename W>
void Project(const Projection<T, W>& layer, const T* input, int64_t rows, int64_t outputs,
             T* output, const Threads& threads) {
  const Dense<T, W> dense = {input, layer.kernel, layer.bias, output, rows, layer.inputs, outputs};
  threads.share(DenseTasks(outputs), DenseCyclesPerTask(dense),
                [&](int64_t begin, int64_t end) { TakeDenseTasks(dense, begin, end); });
}

}  // namespace

template <typename T, typename C, typename W>
void TakeCoSiEncoderStep(const CoSiEncoderStep<T, C, W>& step, const Threads& threads) {
  CoSiMhaStep<T, C, W> attention = step.attention;
  const T* x = attention.query.input;
  const int64_t rows = attention.attention.num_streams, features = attention.query.inputs;
  const int64_t size = rows * features;
  // Not initialized: every element is written before it is read.
  const std::unique_ptr<T[]> scratch(new T[3 * size + rows * step.hidden_features]);
  T* normal = scratch.get();
  T* attended = normal + size;
  T* output = attended + size;
  T* hidden = output + size;

  if (step.norm_first) {
    Normalize(step.attention_norm, x, rows, features, normal);
    attention.query.input = attention.key.input = attention.value.input = normal;
    if (attention.gate.kernel != nullptr) attention.gate.input = normal;
  }
  attention.result = step.result == nullptr ? nullptr : attended;
  TakeCoSiMhaStep(attention, threads);
  if (step.result == nullptr) return;
  Add(attended, x, size);
  const T* input = attended;  // input of the feed-forward part
  if (step.norm_first) {
    Normalize(step.output_norm, attended, rows, features, normal);
    input = normal;
  } else {
    Normalize(step.attention_norm, attended, rows, features, attended);
  }
  Project(step.hidden, input, rows, step.hidden_features, hidden, threads);
  Apply(step.activation, hidden, rows * step.hidden_features, hidden);
  Project(step.output, hidden, rows, features, output, threads);
  Add(output, attended, size);
  if (step.norm_first) {
    std::copy_n(output, size, step.result);
  } else {
    Normalize(step.output_norm, output, rows, features, step.result);
  }
}

#define INSTANTIATE(T, C, W) \
  template void TakeCoSiEncoderStep<T, C, W>(const CoSiEncoderStep<T, C, W>&, const Threads&);
CONTINUAL_TRANSFORMERS_FOR_STEP_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
