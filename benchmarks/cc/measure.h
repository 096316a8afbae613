// A clock and medians for the session benchmarks.

#ifndef CONTINUAL_TRANSFORMERS_BENCHMARKS_MEASURE_H_
#define CONTINUAL_TRANSFORMERS_BENCHMARKS_MEASURE_H_

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <vector>

namespace continual_transformers {

// Returns the microseconds since an arbitrary moment.
inline double Now() {
  const auto now = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::micro>(now).count();
}

// Returns the element that a share `part` of all elements does not exceed. 0.5 gives the median.
inline double Quantile(std::vector<double> values, double part) {
  const size_t at = std::min(values.size() - 1, static_cast<size_t>(part * values.size()));
  std::nth_element(values.begin(), values.begin() + at, values.end());
  return values[at];
}

inline double Median(std::vector<double> values) { return Quantile(std::move(values), 0.5); }

// Returns the microseconds per call of f. `calls` must be large enough to make the clock's cost
// negligible.
template <typename F>
double Microseconds(const F& f, int calls) {
  const double start = Now();
  for (int i = 0; i < calls; ++i) f();
  return (Now() - start) / calls;
}

// Returns the time between two successive readings of the clock.
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
