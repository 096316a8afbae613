// The bound of a step: the sum over its parts, each dense product and each attention, of the larger
// of two times. One is a plain read of the part's bytes, from where they are when it runs. The
// other is its multiply-adds at the rate of a loop in registers. Both are measured, with one
// thread.

#ifndef CONTINUAL_TRANSFORMERS_BENCHMARKS_BOUND_H_
#define CONTINUAL_TRANSFORMERS_BENCHMARKS_BOUND_H_

#include <cstddef>
#include <cstdint>
#include <vector>

namespace continual_transformers {

// Bytes that begin at a cache line. Memory from malloc begins 16 bytes after one, so that every
// vector of 64 bytes would be read from two lines.
class CacheLines {
 public:
  explicit CacheLines(int64_t bytes) : memory_(bytes + kLine, 1) {}
  char* data() {
    return memory_.data() + (kLine - reinterpret_cast<uintptr_t>(memory_.data()) % kLine) % kLine;
  }

 private:
  static constexpr size_t kLine = 64;
  std::vector<char> memory_;
};

// The work of one part of a step.
struct BoundPart {
  int64_t weight_bytes;   // read once for all streams
  int64_t stream_bytes;   // read for each stream
  int64_t multiply_adds;  // for all streams
};

// A dense product of `rows` rows with a kernel of float32.
BoundPart DensePart(int64_t rows, int64_t inputs, int64_t outputs);

// Attention of one query of each stream over the keys and values of its window. `features` is E,
// and `element_bytes` the size of an element of a ring.
BoundPart AttentionPart(int64_t streams, int64_t window, int64_t features, int64_t element_bytes);

class Bound {
 public:
  Bound(const std::vector<BoundPart>& parts, int64_t streams);

  struct Time {
    double median;              // microseconds; the sum of the next two
    double reading, computing;  // the parts that are bound by reading, and by computing
    int64_t samples;
    double gigaflops;
    std::vector<double> parts;  // microseconds of each part, those of reading from the constructor
  };
  // Reads everything again and again for this many seconds, and at least `least` times.
  Time Measure(double seconds, int least);

 private:
  struct Part : BoundPart {
    int64_t weights_at, stream_at;  // where its bytes begin
    bool computes;
    double read_time;  // microseconds, of this part with the clock read around it
  };

  // Reads everything once as a step would. Returns the microseconds of the parts that are bound by
  // reading.
  double ReadOnce();
  void Read(const Part& part);
  void Classify();

  const int64_t streams_;
  const double clock_;
  std::vector<Part> parts_;
  int64_t weights_bytes_ = 0, stream_bytes_ = 0;  // of all parts; the second is for one stream
  CacheLines weights_{0}, rings_{0};
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_BENCHMARKS_BOUND_H_
