// A clock and medians, for the benchmarks of sessions.

#ifndef CONTINUAL_TRANSFORMERS_BENCHMARKS_MEASURE_H_
#define CONTINUAL_TRANSFORMERS_BENCHMARKS_MEASURE_H_

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

namespace continual_transformers {

// Microseconds since some moment.
inline double Now() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

// The element that `part` of all are not above; of 0.5 the median.
inline double Quantile(std::vector<double> values, double part) {
  const size_t at = std::min(values.size() - 1, static_cast<size_t>(part * values.size()));
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[at];
}

inline double Median(std::vector<double> values) { return Quantile(std::move(values), 0.5); }

// Microseconds a call of f takes, over calls so many that the clock does not count.
template <typename F>
double Microseconds(const F& f, int calls) {
  const double start = Now();
  for (int i = 0; i < calls; ++i) f();
  return (Now() - start) / calls;
}

// The time that two readings of the clock seem to take.
inline double ClockMicroseconds() {
  std::vector<double> times;
  for (int i = 0; i < 1000; ++i) {
    const double start = Now();
    times.push_back(Now() - start);
  }
  return Median(std::move(times));
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_BENCHMARKS_MEASURE_H_
