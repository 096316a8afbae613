#include "benchmarks/cc/bound.h"

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "benchmarks/cc/fma_loop.h"
#include "benchmarks/cc/measure.h"
#include "cc/attention/read_loop.h"

namespace continual_transformers {
namespace {

volatile float sink = 0;

int64_t WholeLines(int64_t bytes) { return (bytes + 63) / 64 * 64; }

// Returns the microseconds of a million multiply-adds.
double MultiplyAddOnce() {
  const double start = Now();
  const FmaLoopResult result = FmaLoop(2000);
  const double time = Now() - start;
  sink = sink + result.sum;
  return time * 1e6 / static_cast<double>(result.multiply_adds);
}

}  // namespace

BoundPart DensePart(int64_t rows, int64_t inputs, int64_t outputs) {
  return {inputs * outputs * 4, 0, rows * inputs * outputs};
}

BoundPart AttentionPart(int64_t streams, int64_t window, int64_t features, int64_t element_bytes) {
  return {0, 2 * window * features * element_bytes, 2 * streams * window * features};
}

Bound::Bound(const std::vector<BoundPart>& parts, int64_t streams)
    : streams_(streams), clock_(ClockMicroseconds()) {
  for (const BoundPart& part : parts) {
    parts_.push_back({part, weights_bytes_, stream_bytes_, false, 0});
    weights_bytes_ += WholeLines(part.weight_bytes);
    stream_bytes_ += WholeLines(part.stream_bytes);
  }
  weights_ = CacheLines(weights_bytes_);
  rings_ = CacheLines(streams * stream_bytes_);
  Classify();
}

void Bound::Read(const Part& part) {
  unsigned char sum = ReadLoop(weights_.data() + part.weights_at, part.weight_bytes);
  if (part.stream_bytes > 0) {
    for (int64_t m = 0; m < streams_; ++m) {
      sum ^= ReadLoop(rings_.data() + m * stream_bytes_ + part.stream_at, part.stream_bytes);
    }
  }
  sink = sink + sum;
}

double Bound::ReadOnce() {
  double time = 0;
  size_t i = 0;
  while (i < parts_.size()) {
    if (parts_[i].computes) {
      Read(parts_[i++]);
      continue;
    }
    // Read the clock once for several parts in a row.
    const double start = Now();
    while (i < parts_.size() && !parts_[i].computes) Read(parts_[i++]);
    time += std::max(0.0, Now() - start - clock_);
  }
  return time;
}

void Bound::Classify() {
  std::vector<std::vector<double>> times(parts_.size());
  std::vector<double> rates;
  const int passes = streams_ > 16 ? 15 : 200;
  for (int pass = 0; pass < passes; ++pass) {
    for (size_t i = 0; i < parts_.size(); ++i) {
      const double start = Now();
      Read(parts_[i]);
      times[i].push_back(Now() - start - clock_);
    }
    rates.push_back(MultiplyAddOnce());
  }
  const double rate = Median(rates);
  for (size_t i = 0; i < parts_.size(); ++i) {
    parts_[i].read_time = Median(times[i]);
    parts_[i].computes =
        static_cast<double>(parts_[i].multiply_adds) / 1e6 * rate > parts_[i].read_time;
  }
}

Bound::Time Bound::Measure(double seconds, int least) {
  std::vector<double> reads, rates;
  const double end = Now() + 1e6 * seconds;
  while (static_cast<int>(reads.size()) < least || Now() < end) {
    reads.push_back(ReadOnce());
    if (reads.size() % 16 == 1) rates.push_back(MultiplyAddOnce());
  }
  const double rate = Median(rates), reading = Median(reads);
  double computing = 0;
  std::vector<double> parts;
  for (const Part& part : parts_) {
    const double products = static_cast<double>(part.multiply_adds) / 1e6 * rate;
    if (part.computes) computing += products;
    parts.push_back(part.computes ? products : part.read_time);
  }
  return {reading + computing, reading,         computing, static_cast<int64_t>(reads.size()),
          2e3 / rate,          std::move(parts)};
}

}  // namespace continual_transformers
