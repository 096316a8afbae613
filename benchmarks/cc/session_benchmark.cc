// Measures a session's other goals: even step times, cheap streams, little memory.
// Prints each result and its goal.
//
//   session_benchmark MODEL.safetensors [--json] [--quick]
//
// The model must have one input and one output, both float32, and rings of float32.

#include <malloc.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <fstream>
#include <iostream>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "benchmarks/cc/fma_loop.h"
#include "benchmarks/cc/measure.h"
#include "cc/session/session.h"
#include "nlohmann/json.hpp"

namespace continual_transformers {
namespace {

using Json = nlohmann::json;

// Returns the resident memory of this process, in bytes.
double ResidentBytes() {
  int64_t total = 0, resident = 0;
  std::ifstream("/proc/self/statm") >> total >> resident;
  return static_cast<double>(resident * sysconf(_SC_PAGESIZE));
}

class Benchmark {
 public:
  Benchmark(const std::string& path, bool quick)
      : file_(ModelFile::Map(path)),
        quick_(quick),
        inputs_(file_->plan().values[file_->plan().inputs.at(0).value].size * 64),
        outputs_(file_->plan().values[file_->plan().outputs.at(0).value].size) {
    std::mt19937 random(1);
    std::normal_distribution<float> normal;
    for (float& x : inputs_) x = normal(random);
  }

  Json Run() {
    Memory();  // first: no freed memory is left over yet
    EvenSteps();
    FirstSteps();
    OpenAndClose();
    CopyAndPutBack();
    TwoThreads();
    return results_;
  }

 private:
  std::unique_ptr<Session> NewSession() const {
    return std::make_unique<Session>(file_, SessionOptions{});
  }

  std::vector<StreamId> Open(Session* session, int64_t count) const {
    std::vector<StreamId> ids(count);
    session->Open(count, ids.data());
    return ids;
  }

  int64_t Scaled(int64_t count) const {
    return quick_ ? std::max<int64_t>(20, count / 100) : count;
  }

  // Takes a step of one stream into `outputs`. The input is one of 64 steps.
  void Step(Session* session, StreamId id, int64_t at, float* outputs) const {
    const void* inputs[] = {inputs_.data() + at % 64 * (inputs_.size() / 64)};
    void* to[] = {outputs};
    session->Step(&id, 1, 1, inputs, to);
  }

  void Fill(Session* session, const std::vector<StreamId>& ids) {
    const int64_t steps = file_->plan().receptive_field + 1;
    for (const StreamId id : ids) {
      for (int64_t at = 0; at < steps; ++at) Step(session, id, at, outputs_.data());
    }
  }

  // Returns the bytes of keys, values and the state of other nodes, without padding and masks.
  double Arithmetic(const Session& session) const {
    double bytes = 0;
    for (const StateEntry& entry : session.executor()->state()) {
      if (entry.dtype == DType::kBool) continue;
      double size = static_cast<double>(SizeOf(entry.dtype));
      for (const int64_t axis : entry.shape) size *= static_cast<double>(axis);
      bytes += size;
    }
    return bytes;
  }

  void Add(const std::string& what, double measured, const std::string& unit, double goal,
           bool at_least = false, const std::string& detail = "") {
    results_.push_back({{"what", what},
                        {"measured", measured},
                        {"unit", unit},
                        {"goal", goal},
                        {"at_least", at_least},
                        {"detail", detail}});
  }

  static std::string Text(double number, const char* unit) {
    char text[64];
    std::snprintf(text, sizeof(text), "%.4g%s", number, unit);
    return text;
  }

  void Memory() {
    auto session = NewSession();
    // Makes the arena, and everything else that is made once.
    Fill(session.get(), Open(session.get(), 1));
    double before = ResidentBytes();
    const int64_t opened = Scaled(100000);
    std::vector<StreamId> ids(opened);
    std::fill(ids.begin(), ids.end(), 0);
    before = ResidentBytes();  // includes the ids, which belong to the caller
    session->Open(opened, ids.data());
    Add("memory of " + std::to_string(opened) + " streams opened and never stepped",
        (ResidentBytes() - before) / 1e6, " MB", 50);
    session->Close(ids.data(), opened);

    session = NewSession();
    const StreamId one = Open(session.get(), 1)[0];
    Fill(session.get(), {one});
    malloc_trim(0);
    const int64_t used = Scaled(1000);
    ids.resize(used);
    before = ResidentBytes();
    session->Open(used, ids.data());
    Fill(session.get(), ids);
    const double grown = ResidentBytes() - before;
    const double arithmetic = Arithmetic(*session) * static_cast<double>(used);
    Add("memory of " + std::to_string(used) + " streams in use over the arithmetic",
        grown / arithmetic, "×", 1.02, false,
        Text(grown / 1e6, " MB of ") + Text(arithmetic / 1e6, " MB"));
    session->Close(ids.data(), used);
    session->Close(&one, 1);
    const double kept = ResidentBytes() - before;
    Add("of it kept after closing all", 100 * kept / grown, " %", 10, false,
        Text(kept / 1e6, " MB; a store keeps one empty slab, of about 4 MB"));
  }

  void EvenSteps() {
    auto session = NewSession();
    const StreamId id = Open(session.get(), 1)[0];
    Fill(session.get(), {id});
    // The goal is for an idle core: other processes may disturb some of the runs.
    const int64_t steps = Scaled(20000);
    double least = 0, median = 0, p99 = 0;
    std::vector<double> all;
    for (int run = 0; run < 10; ++run) {
      std::vector<double> times(steps);
      for (int64_t at = 0; at < steps; ++at) {
        const double start = Now();
        Step(session.get(), id, at, outputs_.data());
        times[at] = Now() - start;
      }
      const double ratio = Quantile(times, 0.99) / Median(times);
      if (run == 0 || ratio < least) {
        least = ratio;
        median = Median(times);
        p99 = Quantile(times, 0.99);
      }
      all.insert(all.end(), times.begin(), times.end());
    }
    Add("p99 of a step over the median, in the most even of 10 runs", least, "×", 2, false,
        Text(median, " µs and ") + Text(p99, " µs; over all runs ") +
            Text(Quantile(all, 0.99) / Median(all), "×"));
  }

  void FirstSteps() {
    // Alternate between streams, so that each comes from memory at every step.
    auto session = NewSession();
    Fill(session.get(), Open(session.get(), 1));
    const auto ids = Open(session.get(), Scaled(500));
    const int64_t steps = file_->plan().receptive_field + 20;
    std::vector<double> first, later;
    for (int64_t at = 0; at < steps; ++at) {
      for (const StreamId id : ids) {
        const double start = Now();
        Step(session.get(), id, at, outputs_.data());
        const double time = Now() - start;
        if (at == 0) first.push_back(time);
        if (at >= steps - 16) later.push_back(time);
      }
    }
    Add("first step of a stream opened beforehand over a later one", Median(first) / Median(later),
        "×", 2, false, Text(Median(first), " µs and ") + Text(Median(later), " µs"));
  }

  void OpenAndClose() {
    double opening[2], closing[2];
    const int64_t held[2] = {10, Scaled(1000000)};
    for (int i = 0; i < 2; ++i) {
      auto session = NewSession();
      auto ids = Open(session.get(), held[i]);
      std::mt19937 random(1);
      std::vector<double> open, close;
      // Time several at once, at random places: reading the clock costs as much as one of them.
      const int64_t some = std::min<int64_t>(held[i], 8);
      for (int round = 0; round < 2000; ++round) {
        std::vector<int64_t> chosen(some);
        const int64_t apart = held[i] / some;
        for (int64_t j = 0; j < some; ++j) chosen[j] = j * apart + random() % apart;
        double start = Now();
        for (const int64_t at : chosen) session->Close(&ids[at], 1);
        close.push_back((Now() - start) / some);
        start = Now();
        for (const int64_t at : chosen) session->Open(1, &ids[at]);
        open.push_back((Now() - start) / some);
      }
      opening[i] = Median(open);
      closing[i] = Median(close);
    }
    const std::string many = std::to_string(held[1]);
    Add("open a stream, 10 held", opening[0], " µs", 1);
    Add("open a stream, " + many + " held", opening[1], " µs", 1);
    Add("close a stream, 10 held", closing[0], " µs", 1);
    Add("close a stream, " + many + " held", closing[1], " µs", 1);
  }

  void CopyAndPutBack() {
    for (const int64_t held : {int64_t{10}, Scaled(100000)}) {
      auto session = NewSession();
      auto ids = Open(session.get(), held);
      // Ten streams take turns. They are spread from the first to the last open stream.
      std::vector<StreamId> used;
      for (int64_t i = 0; i < 10; ++i) used.push_back(ids[i * (held - 1) / 9]);
      Fill(session.get(), used);
      const int64_t bytes = session->state_bytes();
      const int64_t block = session->executor()->block_bytes();
      std::vector<char> state(bytes, 1);
      std::vector<std::vector<char>> blocks(used.size(), std::vector<char>(block, 1));
      std::vector<double> out, back, plain_out, plain_back;
      for (int64_t round = 0; round < Scaled(3000); ++round) {
        for (size_t i = 0; i < used.size(); ++i) {
          plain_out.push_back(
              Microseconds([&] { std::memcpy(state.data(), blocks[i].data(), block); }, 1));
        }
        for (const StreamId id : used) {
          out.push_back(Microseconds([&] { session->GetState(id, state.data()); }, 1));
        }
        for (size_t i = 0; i < used.size(); ++i) {
          plain_back.push_back(
              Microseconds([&] { std::memcpy(blocks[i].data(), state.data(), block); }, 1));
        }
        for (const StreamId id : used) {
          back.push_back(Microseconds([&] { session->SetState(id, state.data(), bytes); }, 1));
        }
      }
      const std::string at = std::to_string(held) + " held";
      Add("copy out a stream over a memcpy of its block, " + at, Median(out) / Median(plain_out),
          "×", 2, false, Text(Median(out), " µs and ") + Text(Median(plain_out), " µs"));
      Add("put back a stream over a memcpy of its block, " + at, Median(back) / Median(plain_back),
          "×", 2, false, Text(Median(back), " µs and ") + Text(Median(plain_back), " µs"));
    }
  }

  void TwoThreads() {
    if (std::thread::hardware_concurrency() < 2) return;
    auto session = NewSession();
    const auto ids = Open(session.get(), 2);
    Fill(session.get(), ids);
    const auto step = [&](int thread, int64_t at, float* outputs) {
      Step(session.get(), ids[thread], at, outputs);
    };
    // Two hardware threads may share a core. A loop that only computes shows how much the second
    // one adds.
    const auto compute = [](int, int64_t, float* outputs) { outputs[0] = FmaLoop(500).sum; };
    std::vector<double> ratios, computing;
    for (int round = 0; round < 7; ++round) {
      ratios.push_back(TwoOverOne(step));
      computing.push_back(TwoOverOne(compute));
    }
    Add("two threads on different streams over one", Median(ratios), "×", 1.8, true,
        "most of 7 rounds " + Text(*std::max_element(ratios.begin(), ratios.end()), "×") +
            "; multiply-adds in registers, two threads over one: " + Text(Median(computing), "×"));
  }

  // Returns the rate of two threads together, divided by the rate of one.
  template <class F>
  double TwoOverOne(const F& once) const {
    const double one = Rate(1, once);
    return Rate(2, once) / one;
  }

  // Returns how many times a microsecond all threads together call `once`(thread, call, memory).
  template <class F>
  double Rate(int threads, const F& once) const {
    std::atomic<int> ready{0};
    std::atomic<bool> stop{false};
    std::vector<int64_t> calls(threads * 16);  // one cache line per thread
    std::vector<std::thread> running;
    for (int t = 0; t < threads; ++t) {
      running.emplace_back([&, t] {
        std::vector<float> outputs(outputs_.size() + 64);
        int64_t call = 0;
        ++ready;
        while (ready < threads) {
        }
        while (!stop) once(t, call++, outputs.data() + 32);
        calls[t * 16] = call;
      });
    }
    while (ready < threads) std::this_thread::yield();
    const double start = Now();
    std::this_thread::sleep_for(std::chrono::milliseconds(quick_ ? 5 : 200));
    stop = true;
    const double time = Now() - start;
    for (std::thread& thread : running) thread.join();
    int64_t sum = 0;
    for (int t = 0; t < threads; ++t) sum += calls[t * 16];
    return static_cast<double>(sum) / time;
  }

  const std::shared_ptr<const ModelFile> file_;
  const bool quick_;
  std::vector<float> inputs_;
  std::vector<float> outputs_;
  Json results_ = Json::array();
};

int Main(int argc, char** argv) {
  std::string path;
  bool json = false, quick = false;
  for (int i = 1; i < argc; ++i) {
    const std::string argument = argv[i];
    if (argument == "--json") {
      json = true;
    } else if (argument == "--quick") {
      quick = true;
    } else {
      path = argument;
    }
  }
  if (path.empty()) {
    std::cerr << "usage: session_benchmark MODEL.safetensors [--json] [--quick]\n";
    return 2;
  }
  const Json results = Benchmark(path, quick).Run();
  if (json) {
    std::cout << results.dump() << std::endl;
    return 0;
  }
  for (const Json& result : results) {
    const double measured = result["measured"], goal = result["goal"];
    const bool at_least = result["at_least"];
    const bool reached = at_least ? measured >= goal : measured <= goal;
    const std::string unit = result["unit"], what = result["what"], detail = result["detail"];
    std::printf("%-62s %8.3g%s (goal: %s %g%s)%s%s%s\n", what.c_str(), measured, unit.c_str(),
                at_least ? "at least" : "at most", goal, unit.c_str(),
                reached ? "" : " NOT REACHED", detail.empty() ? "" : ": ", detail.c_str());
  }
  return 0;
}

}  // namespace
}  // namespace continual_transformers

int main(int argc, char** argv) {
  try {
    return continual_transformers::Main(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << error.what() << std::endl;
    return 1;
  }
}
