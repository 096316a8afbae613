// The conversation of a worker of the race: requests on standard input, answers on standard output,
// a line of JSON each, as in bench/worker.py.

#ifndef CONTINUAL_TRANSFORMERS_BENCHMARKS_REQUESTS_H_
#define CONTINUAL_TRANSFORMERS_BENCHMARKS_REQUESTS_H_

#include <algorithm>
#include <cstdint>
#include <exception>
#include <iostream>
#include <string>
#include <vector>

#include "benchmarks/cc/bound.h"
#include "benchmarks/cc/measure.h"
#include "nlohmann/json.hpp"

namespace continual_transformers {

// Answers requests until standard input ends. `answer` is a function of a request's name and its
// arguments. What it throws becomes an answer too.
template <typename F>
void AnswerRequests(const F& answer) {
  std::string line;
  while (std::getline(std::cin, line)) {
    nlohmann::json reply;
    try {
      const nlohmann::json request = nlohmann::json::parse(line);
      reply = answer(request.at(0).get<std::string>(), request.at(1));
    } catch (const std::exception& error) {
      reply = {{"error", error.what()}};
    }
    std::cout << reply.dump() << std::endl;
  }
}

// Calls `step` for this many seconds, and answers with the median of its microseconds. Fast steps
// are timed several at once, at most `most`.
template <typename F>
nlohmann::json Burst(const F& step, double seconds, int least, int most = 64) {
  constexpr double kChunkMicroseconds = 200;
  const double one = Microseconds(step, 1);
  const int chunk = static_cast<int>(std::clamp(kChunkMicroseconds / one, 1.0, 1.0 * most));
  std::vector<double> times;
  const double end = Now() + 1e6 * seconds;
  while (static_cast<int>(times.size()) < least || Now() < end) {
    times.push_back(Microseconds(step, chunk));
  }
  return {{"median", Median(times)}, {"steps", times.size() * chunk}};
}

inline nlohmann::json BurstOfBound(Bound* bound, double seconds, int least) {
  const Bound::Time time = bound->Measure(seconds, least);
  return {{"median", time.median},       {"steps", time.samples},       {"reading", time.reading},
          {"computing", time.computing}, {"gigaflops", time.gigaflops}, {"parts", time.parts}};
}

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_BENCHMARKS_REQUESTS_H_
