// Pinned memory of the host through which a small step's own kernels take its inputs and deliver
// its outputs. A step is then one launch of a graph, without copies around it, each of which would
// take about as long as a kernel. An array on the GPU is read and written where it is: the mailbox
// has its address.

#ifndef CONTINUAL_TRANSFORMERS_CUDA_SESSION_MAILBOX_H_
#define CONTINUAL_TRANSFORMERS_CUDA_SESSION_MAILBOX_H_

#include <cuda_runtime.h>

#include <cstdint>
#include <memory>
#include <vector>

#include "cuda/session/device_memory.h"

namespace continual_transformers {

// How many inputs, and how many outputs, a small step can have.
constexpr int kMostMailedPorts = 8;
// Things in the mailbox begin at multiples of this many bytes, and are copied in such pieces.
constexpr int64_t kMailedPiece = 16;

// The bytes of an input or output of a step.
struct MailedPort {
  int64_t at;    // from the beginning of the inputs or outputs in the mailbox
  int64_t size;  // of all streams
};

// Copies `bytes`, at most a piece.
__device__ inline void CopyPiece(const char* from, char* to, int64_t bytes) {
  struct alignas(kMailedPiece) Piece {
    uint64_t words[2];
  };
  const auto address = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
  if (bytes >= kMailedPiece && address % kMailedPiece == 0) {
    *reinterpret_cast<Piece*>(to) = *reinterpret_cast<const Piece*>(from);
    return;
  }
  for (int64_t i = 0; i < bytes && i < kMailedPiece; ++i) to[i] = from[i];
}

// i is a piece of what the host sends: of the blocks' addresses, the positions, the key mask or an
// input. They lie in the mailbox as in the step's memory.
struct TakeInputsEach {
  const char* from;
  char* to;
  int64_t size;               // of all, a multiple of a piece
  const char* const* arrays;  // in the mailbox, one for each port: an array on the GPU, or null
  int num_ports;
  MailedPort ports[kMostMailedPorts];

  __host__ __device__ int64_t Count() const { return size / kMailedPiece; }
  __device__ void operator()(int64_t i) const {
    const int64_t at = i * kMailedPiece;
    for (int p = 0; p < num_ports; ++p) {
      const int64_t within = at - ports[p].at;
      if (within < 0 || within >= ports[p].size) continue;
      if (arrays[p] == nullptr) break;
      return CopyPiece(arrays[p] + within, to + at, ports[p].size - within);
    }
    CopyPiece(from + at, to + at, kMailedPiece);
  }
};

// i is a piece of an output, and also the number of a stream.
struct DeliverOutputsEach {
  char* to;
  int64_t size;         // of all outputs, a multiple of a piece
  char* const* arrays;  // in the mailbox, one for each port: an array on the GPU, or null
  int num_ports;
  MailedPort ports[kMostMailedPorts];
  const char* values[kMostMailedPorts];  // where the outputs are
  int64_t* positions;                    // [M]
  int64_t streams;                       // M

  __host__ __device__ int64_t Count() const {
    const int64_t pieces = size / kMailedPiece;
    return pieces > streams ? pieces : streams;
  }
  __device__ void operator()(int64_t i) const {
    if (i < streams) ++positions[i];
    const int64_t at = i * kMailedPiece;
    for (int p = 0; p < num_ports; ++p) {
      const int64_t within = at - ports[p].at;
      if (within < 0 || within >= ports[p].size) continue;
      char* const target = arrays[p] == nullptr ? to + at : arrays[p] + within;
      return CopyPiece(values[p] + within, target, ports[p].size - within);
    }
  }
};

class Mailbox {
 public:
  // The largest inputs, with what else the host sends, and the largest outputs. For more, copies by
  // the GPU's engines are faster. The limit is a guess, which no GPU has measured.
  static constexpr int64_t kMostBytes = 64 << 10;

  // `sent`: the bytes that the host sends. The ports of inputs are among them.
  static bool Fits(int64_t sent, const std::vector<MailedPort>& inputs,
                   const std::vector<MailedPort>& outputs);

  Mailbox() = default;
  explicit Mailbox(std::shared_ptr<const Gpu> gpu);

  // What the host sends, and what it receives. [kMostBytes]
  char* inputs() const { return memory_.get(); }
  char* outputs() const { return memory_.get() + kMostBytes; }
  // The arrays of ports that are on the GPU; null: the port is in the mailbox. [kMostMailedPorts]
  const char** input_arrays() const {
    return reinterpret_cast<const char**>(memory_.get() + 2 * kMostBytes);
  }
  char** output_arrays() const {
    return reinterpret_cast<char**>(memory_.get() + 2 * kMostBytes) + kMostMailedPorts;
  }

  int64_t bytes() const { return memory_.bytes(); }

 private:
  GpuBytes memory_;
};

// Returns the ports of values of these sizes, one after the other.
std::vector<MailedPort> MailedPortsOf(const std::vector<int64_t>& sizes);

// Returns the bytes up to the end of the last port, a multiple of a piece.
int64_t MailedBytes(const std::vector<MailedPort>& ports);

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_CUDA_SESSION_MAILBOX_H_
