// What the race of the attention layer measures in C++: the bounds of the layers' steps, and a
// session's attention kernel against the bound of its own. The program takes the same requests as
// bench/worker.py, one line of JSON each.
//
//   layer_benchmark bound|retroactive_bound|attention THREADS

#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#include "benchmarks/cc/bound.h"
#include "benchmarks/cc/measure.h"
#include "benchmarks/cc/requests.h"
#include "cc/attention/elementwise.h"
#include "cc/attention/half.h"
#include "cc/attention/ring_attention.h"
#include "nlohmann/json.hpp"

namespace continual_transformers {
namespace {

using Json = nlohmann::json;

struct LayerSize {
  int64_t window, features, heads, streams;
};

// The four products have `features` outputs. The ring's heads are beside each other, so the bytes
// do not depend on their number.
std::vector<BoundPart> PartsOfLayer(const LayerSize& size) {
  const int64_t m = size.streams, e = size.features;
  const BoundPart product = DensePart(m, e, e);
  return {product, product, product, AttentionPart(m, size.window, e, sizeof(float)), product};
}

// A retroactive step returns a row for each query of the window, and projects them all. Its
// attention must read the queries and the sums of weighted values, which are double. For each
// feature of each row it multiplies and adds four times: the query with the new key and with the
// one that leaves, the sum with their values.
std::vector<BoundPart> PartsOfRetroactiveLayer(const LayerSize& size) {
  const int64_t m = size.streams, e = size.features, elements = size.window * e;
  const BoundPart product = DensePart(m, e, e);
  const int64_t bytes = elements * static_cast<int64_t>(sizeof(float) + sizeof(double));
  const BoundPart attention = {0, bytes, 4 * m * elements};
  return {product, product, product, attention, DensePart(m * size.window, e, e)};
}

struct AttentionSize {
  int64_t window, heads, head, streams;

  int64_t features() const { return heads * head; }
};

// Attention of each stream's query over its full ring, as a session's step computes it.
class Attention {
 public:
  virtual ~Attention() = default;
  virtual void Step() = 0;
};

template <typename C>
class RingOf : public Attention {
 public:
  explicit RingOf(const AttentionSize& size)
      : size_(size),
        ring_bytes_(2 * size.window * size.features() * static_cast<int64_t>(sizeof(C))),
        rings_(size.streams * ring_bytes_),
        scales_(2 * size.streams * size.window, 0.01f),
        query_(size.features()),
        output_(size.features()),
        logits_(size.heads * RingAttentionLogits(size.window)) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& x : query_) x = normal(random);
    // One ring of random numbers, and copies of it.
    C* const first = Ring(0);
    for (int64_t i = 0; i < ring_bytes_ / static_cast<int64_t>(sizeof(C)); ++i) {
      const float x = normal(random);
      if constexpr (std::is_same_v<C, int8_t>) {
        first[i] = static_cast<int8_t>(std::clamp(40 * x, -127.0f, 127.0f));
      } else if constexpr (std::is_same_v<C, BFloat16>) {
        Narrow(&x, 1, first + i);
      } else {
        first[i] = x;
      }
    }
    for (int64_t m = 1; m < size.streams; ++m) std::memcpy(Ring(m), first, ring_bytes_);
  }

  void Step() override {
    // As in AttentionInstruction: if the rings of all streams are more than what a near cache
    // holds, the next one is prefetched.
    const bool far = size_.streams * ring_bytes_ > (256 << 10);
    const int64_t half = size_.window * size_.features();
    for (int64_t m = 0; m < size_.streams; ++m) {
      RingAttentionParams<float, C> p = {};
      p.query = query_.data();
      p.key = Ring(m);
      p.value = p.key + half;
      p.key_stride = p.value_stride = size_.features();
      if (std::is_same_v<C, int8_t>) {
        p.key_scale = scales_.data() + 2 * m * size_.window;
        p.value_scale = p.key_scale + size_.window;
      }
      p.spans = {{0, size_.window}, {0, 0}};
      p.output = output_.data();
      p.heads = p.key_heads = size_.heads;
      p.key_dim = p.value_dim = size_.head;
      p.scale = 1 / std::sqrt(static_cast<float>(size_.head));
      p.logits = logits_.data();
      p.far = far;
      if (far && m + 1 < size_.streams) p.next_key = Ring(m + 1);
      RingAttention(p, 0, size_.heads);
    }
  }

 private:
  C* Ring(int64_t m) { return reinterpret_cast<C*>(rings_.data() + m * ring_bytes_); }

  const AttentionSize size_;
  const int64_t ring_bytes_;
  CacheLines rings_;
  std::vector<float> scales_, query_, output_, logits_;
};

// Returns the bytes of the last-level cache, or what most machines have at most if it is not known.
int64_t LastCacheBytes() {
  const int64_t known = std::max(sysconf(_SC_LEVEL2_CACHE_SIZE), sysconf(_SC_LEVEL3_CACHE_SIZE));
  return known > 0 ? known : 64 << 20;
}

class Worker {
 public:
  explicit Worker(std::string name) : name_(std::move(name)) {}

  Json Answer(const std::string& what, const Json& arguments) {
    if (what == "prepare") return Prepare(arguments);
    if (what == "burst") return TimeBurst(arguments["seconds"], arguments["least"]);
    if (what == "versions") return Json::object();
    throw std::invalid_argument("expected prepare, burst or versions, but got " + what);
  }

 private:
  Json Prepare(const Json& arguments) {
    bound_.reset();  // Free the last size's first.
    attention_.reset();
    const Json& size = arguments["size"];
    if (name_ == "attention") return PrepareAttention(size, arguments["dtype"], arguments["far"]);
    const LayerSize layer = {size[0], size[1], size[2], size[3]};
    if (name_ == "bound") {
      bound_ = std::make_unique<Bound>(PartsOfLayer(layer), layer.streams);
    } else if (name_ == "retroactive_bound") {
      bound_ = std::make_unique<Bound>(PartsOfRetroactiveLayer(layer), layer.streams);
    } else {
      throw std::invalid_argument("expected bound, retroactive_bound or attention, but got " +
                                  name_);
    }
    return Json::object();
  }

  // `far`: as many streams as fill the last-level cache twice, instead of one.
  Json PrepareAttention(const Json& numbers, const std::string& dtype, bool far) {
    AttentionSize size = {numbers[0], numbers[1], numbers[2], 1};
    const int64_t element = dtype == "float32" ? 4 : dtype == "bfloat16" ? 2 : 1;
    BoundPart part = AttentionPart(1, size.window, size.features(), element);
    if (dtype == "int8") part.stream_bytes += 2 * size.window * static_cast<int64_t>(sizeof(float));
    if (far) size.streams = 2 * LastCacheBytes() / part.stream_bytes + 1;
    part.multiply_adds *= size.streams;
    bound_ = std::make_unique<Bound>(std::vector<BoundPart>{part}, size.streams);
    if (dtype == "float32") {
      attention_ = std::make_unique<RingOf<float>>(size);
    } else if (dtype == "bfloat16") {
      attention_ = std::make_unique<RingOf<BFloat16>>(size);
    } else if (dtype == "int8") {
      attention_ = std::make_unique<RingOf<int8_t>>(size);
    } else {
      throw std::invalid_argument("expected float32, bfloat16 or int8, but got " + dtype);
    }
    return {{"streams", size.streams}, {"bytes", size.streams * part.stream_bytes}};
  }

  Json TimeBurst(double seconds, int least) {
    if (attention_ == nullptr) return BurstOfBound(bound_.get(), seconds, least);
    const auto step = [&] { attention_->Step(); };
    Json kernel = Burst(step, seconds, least);
    kernel["bound"] = bound_->Measure(seconds, least).median;
    return kernel;
  }

  const std::string name_;
  std::unique_ptr<Bound> bound_;
  std::unique_ptr<Attention> attention_;
};

int Main(int argc, char** argv) {
  if (argc != 3) {
    std::cerr << "usage: layer_benchmark bound|retroactive_bound|attention THREADS\n";
    return 2;
  }
  Worker worker(argv[1]);
  AnswerRequests([&](const std::string& what, const Json& arguments) {
    return worker.Answer(what, arguments);
  });
  return 0;
}

}  // namespace
}  // namespace continual_transformers

int main(int argc, char** argv) { return continual_transformers::Main(argc, argv); }
