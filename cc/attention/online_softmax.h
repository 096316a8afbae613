// The running state of a softmax whose logits arrive in blocks. A window is read once, and its
// logits are never all in memory (Milakov & Gimelshein 2018, arXiv 1805.02867).

#ifndef CONTINUAL_TRANSFORMERS_ATTENTION_ONLINE_SOFTMAX_H_
#define CONTINUAL_TRANSFORMERS_ATTENTION_ONLINE_SOFTMAX_H_

#include <cmath>
#include <limits>

#include "cc/attention/host_device.h"

namespace continual_transformers {

template <typename T>
struct OnlineSoftmax {
  // The largest logit so far; -infinity before the first.
  T max = -std::numeric_limits<T>::infinity();
  // The sum of Weight(logit) over the logits so far.
  T denominator = 0;

  // Makes room for logits up to `block_max`. The caller must multiply what it accumulated with
  // earlier weights by the result. This function does that for the denominator.
  CONTINUAL_TRANSFORMERS_HOST_DEVICE T Raise(T block_max) {
    if (!(block_max > max)) return T(1);
    const T rescale = std::exp(max - block_max);
    max = block_max;
    denominator *= rescale;
    return rescale;
  }

  // Adds the logits that `other` has seen. The caller must multiply what it accumulated here by
  // `own`, and add what was accumulated there times `others`.
  struct Factors {
    T own, others;
  };
  CONTINUAL_TRANSFORMERS_HOST_DEVICE Factors Merge(const OnlineSoftmax& other) {
    const T own = Raise(other.max);
    const T others = other.max == max ? T(1) : std::exp(other.max - Reference());
    denominator += other.denominator * others;
    return {own, others};
  }

  // What is subtracted from a logit before its exponential: the maximum. While every logit is
  // -infinity it is 0: -infinity - -infinity would be NaN and spoil the finite logits still to
  // come.
  CONTINUAL_TRANSFORMERS_HOST_DEVICE T Reference() const {
    return max == -std::numeric_limits<T>::infinity() ? T(0) : max;
  }

  // The unnormalized weight of a logit that is at most `max`. NaN gives NaN.
  CONTINUAL_TRANSFORMERS_HOST_DEVICE T Weight(T logit) const {
    return std::exp(logit - Reference());
  }

  // The factor that turns sums of weights into probabilities. If nothing is attended it is 0, so
  // that the output is zeros and not 0/0.
  CONTINUAL_TRANSFORMERS_HOST_DEVICE T Normalizer() const {
    return denominator == T(0) ? T(0) : T(1) / denominator;
  }
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_ATTENTION_ONLINE_SOFTMAX_H_
