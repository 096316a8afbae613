#include "cc/attention/co_si_mha_step.h"

#include <algorithm>
#include <array>
#include <cstdint>
#include <memory>
#include <type_traits>

#include "cc/attention/activations.h"
#include "cc/attention/dense.h"
#include "cc/attention/elementwise.h"
#include "cc/attention/params.h"
#include "cc/attention/single_output.h"
#include "cc/attention/step_types.h"

namespace continual_transformers {
namespace {

template <typename T, typename C, typename W>
class Stepper {
 public:
  Stepper(const CoSiMhaStep<T, C, W>& step, const Threads& threads)
      : step_(step),
        attention_(step.attention),
        threads_(threads),
        rows_(attention_.num_streams),
        key_size_(attention_.num_heads * attention_.key_dim),
        value_size_(attention_.num_heads * attention_.value_dim) {}

  void Take() {
    // Not initialized: every element is written before it is read.
    const int64_t gates = step_.gate.kernel == nullptr ? 0 : rows_ * value_size_;
    scratch_.reset(new T[2 * rows_ * (key_size_ + value_size_) + gates]);
    query_ = scratch_.get();
    key_ = query_ + rows_ * key_size_;
    value_ = key_ + rows_ * key_size_;
    attended_ = value_ + rows_ * value_size_;
    gate_ = attended_ + rows_ * value_size_;
    asking_.reset(new bool[rows_]);

    ProjectIn();
    if (gates > 0) Apply({Activation::kSigmoid}, gate_, gates, gate_);
    for (int64_t m = 0; m < rows_; ++m) {
      asking_[m] = step_.query_mask == nullptr || step_.query_mask[m];
      if (step_.delay > 0) Exchange(m);
    }
    Attend();
    for (int64_t m = 0; m < rows_; ++m) {
      if (!asking_[m]) AttendToNothing(m);
    }
    if (step_.result == nullptr) return;
    if (gates > 0) Multiply(attended_, gate_, gates);
    ProjectOut();
  }

 private:
  void ProjectIn() {
    const std::array<Dense<T, W>, 4> layers = {
        DenseOf(step_.query, key_size_, query_), DenseOf(step_.key, key_size_, key_),
        DenseOf(step_.value, value_size_, value_), DenseOf(step_.gate, value_size_, gate_)};
    // All layers share one range of tasks, so that threads are forked and joined only once.
    std::array<int64_t, 5> first = {};
    int64_t cycles = 0;
    for (size_t i = 0; i < layers.size(); ++i) {
      const int64_t tasks = layers[i].kernel == nullptr ? 0 : DenseTasks(layers[i].outputs);
      first[i + 1] = first[i] + tasks;
      cycles += tasks * DenseCyclesPerTask(layers[i]);
    }
    threads_.share(first.back(), cycles / first.back(), [&](int64_t begin, int64_t end) {
      for (size_t i = 0; i < layers.size(); ++i) {
        const int64_t from = std::max(begin, first[i]), to = std::min(end, first[i + 1]);
        if (from < to) TakeDenseTasks(layers[i], from - first[i], to - first[i]);
      }
    });
  }

  void ProjectOut() {
    Projection<T, W> projection = step_.output;
    projection.input = attended_;
    const Dense<T, W> layer = DenseOf(projection, step_.output_features, step_.result);
    threads_.share(DenseTasks(layer.outputs), DenseCyclesPerTask(layer),
                   [&](int64_t begin, int64_t end) { TakeDenseTasks(layer, begin, end); });
  }

  Dense<T, W> DenseOf(const Projection<T, W>& p, int64_t outputs, T* output) const {
    return {p.input, p.kernel, p.bias, output, rows_, p.inputs, outputs};
  }

  void Attend() {
    std::unique_ptr<C[]> narrow;
    attention_.query = query_;
    if constexpr (std::is_same_v<T, C>) {
      attention_.key = key_;
      attention_.value = value_;
    } else {
      narrow.reset(new C[rows_ * (key_size_ + value_size_)]);
      Narrow(key_, rows_ * (key_size_ + value_size_), narrow.get());  // they are adjacent
      attention_.key = narrow.get();
      attention_.value = narrow.get() + rows_ * key_size_;
    }
    attention_.output = attended_;
    const int64_t heads = attention_.num_heads;
    attention_.query_strides = attention_.key_strides = BatchTimeHead(1, heads, attention_.key_dim);
    attention_.value_strides = attention_.output_strides =
        BatchTimeHead(1, heads, attention_.value_dim);
    const SingleOutputPlan plan = PlanSingleOutput(attention_, threads_.count);
    attention_.window_parts = plan.window_parts;
    attention_.heads_per_task = plan.heads_per_task;
    std::unique_ptr<T[]> parts;
    if (plan.window_parts > 1) {
      parts.reset(new T[plan.tasks * (attention_.value_dim + 2)]);
      attention_.parts = parts.get();
    }
    threads_.share(plan.tasks, plan.cycles_per_task, [this](int64_t begin, int64_t end) {
      SingleOutputAttention(attention_, begin, end);
    });
    FinishSingleOutput(attention_);
  }

  // Exchanges row m's query, gate and mask for those of `delay` steps before. If there was no such
  // step, the query attends to nothing.
  void Exchange(int64_t m) {
    const int64_t stream = attention_.streams[m], position = attention_.position[stream];
    const int64_t row = stream * step_.delay + position % step_.delay;
    const bool taken = position >= step_.delay;
    const auto swap = [&](auto* ring, auto* now, int64_t size) {
      for (int64_t i = 0; i < size; ++i) {
        const auto due = taken ? ring[row * size + i] : std::decay_t<decltype(*now)>();
        if (attention_.update_state) ring[row * size + i] = now[i];
        now[i] = due;
      }
    };
    swap(step_.query_mask_ring, &asking_[m], 1);
    swap(step_.query_ring, query_ + m * key_size_, key_size_);
    if (step_.gate_ring != nullptr) swap(step_.gate_ring, gate_ + m * value_size_, value_size_);
  }

  void AttendToNothing(int64_t m) {
    std::fill_n(attended_ + m * value_size_, value_size_, T(0));
    if (step_.gate.kernel != nullptr) std::fill_n(gate_ + m * value_size_, value_size_, T(0));
    if (attention_.scores == nullptr) return;
    for (int64_t h = 0; h < attention_.num_heads; ++h) {
      std::fill_n(attention_.scores + m * attention_.scores_strides.stream +
                      h * attention_.scores_strides.head,
                  attention_.window, T(0));
    }
  }

  const CoSiMhaStep<T, C, W>& step_;
  SingleOutputParams<T, C> attention_;
  const Threads& threads_;
  const int64_t rows_;
  const int64_t key_size_;
  const int64_t value_size_;
  std::unique_ptr<T[]> scratch_;
  T *query_, *key_, *value_, *attended_, *gate_;
  std::unique_ptr<bool[]> asking_;  // which rows' queries attend to something
};

}  // namespace

template <typename T, typename C, typename W>
void TakeCoSiMhaStep(const CoSiMhaStep<T, C, W>& step, const Threads& threads) {
  Stepper<T, C, W>(step, threads).Take();
}

#define INSTANTIATE(T, C, W) \
  template void TakeCoSiMhaStep<T, C, W>(const CoSiMhaStep<T, C, W>&, const Threads&);
CONTINUAL_TRANSFORMERS_FOR_STEP_TYPES(INSTANTIATE)
#undef INSTANTIATE

}  // namespace continual_transformers
