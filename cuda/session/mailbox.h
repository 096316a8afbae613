// Pinned memory of the host through which a small step's own kernels take its inputs and deliver
// its outputs. A step is then one launch of a graph, without copies around it, each of which would
// take about as long as a kernel. From and to an array on the GPU they copy directly: the mailbox
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
constexpr int64_t kPieceBytes = 16;

// The bytes of an input or output of a step.
struct MailedPort {
  int64_t at;    // from the beginning of the inputs or outputs in the mailbox
  int64_t size;  // of all streams
};

// The address of an output that the caller does not want.
__host__ __device__ inline char* UnwantedOutput() { return reinterpret_cast<char*>(1); }

// Where the arrays of ports are that are on the GPU. Null: the port is in the mailbox.
struct MailedArrays {
  const char* inputs[kMostMailedPorts];
  char* outputs[kMostMailedPorts];  // may be UnwantedOutput()
};

struct alignas(kPieceBytes) MailedPiece {
  uint32_t words[kPieceBytes / sizeof(uint32_t)];
};

// Copies `bytes`, at most a piece.
__device__ inline void CopyPiece(const char* from, char* to, int64_t bytes) {
  constexpr int kWords = kPieceBytes / sizeof(uint32_t);
  const auto address = reinterpret_cast<uintptr_t>(from) | reinterpret_cast<uintptr_t>(to);
  if (bytes >= kPieceBytes && address % kPieceBytes == 0) {
    *reinterpret_cast<MailedPiece*>(to) = *reinterpret_cast<const MailedPiece*>(from);
  } else if (bytes >= kPieceBytes && address % sizeof(uint32_t) == 0) {
    uint32_t words[kWords];  // All are loaded before the first is stored.
    for (int i = 0; i < kWords; ++i) words[i] = reinterpret_cast<const uint32_t*>(from)[i];
    for (int i = 0; i < kWords; ++i) reinterpret_cast<uint32_t*>(to)[i] = words[i];
  } else {
    for (int64_t i = 0; i < bytes && i < kPieceBytes; ++i) to[i] = from[i];
  }
}

// i is a piece of what the host sends: of the blocks' addresses, the positions, the key mask, the
// addresses of arrays, or an input. They lie in the mailbox as in the step's memory.
struct TakeInputsEach {
  const char* from;
  char* to;
  int64_t size;                // of all, a multiple of a piece
  const MailedArrays* arrays;  // in the mailbox
  int num_ports;
  MailedPort ports[kMostMailedPorts];

  __host__ __device__ int64_t Count() const { return size / kPieceBytes; }
  __device__ void operator()(int64_t i) const {
    const int64_t at = i * kPieceBytes;
    // Both are read at once: each read from the host's memory takes about as long as a kernel.
    const MailedPiece piece = *reinterpret_cast<const MailedPiece*>(from + at);
    const char* array = nullptr;
    int64_t within = 0, rest = 0;
    for (int p = 0; p < num_ports; ++p) {
      if (at < ports[p].at || at >= ports[p].at + ports[p].size) continue;
      within = at - ports[p].at;
      rest = ports[p].size - within;
      array = arrays->inputs[p];
    }
    if (array != nullptr) return CopyPiece(array + within, to + at, rest);
    *reinterpret_cast<MailedPiece*>(to + at) = piece;
  }
};

// i is a piece of an output, and also the number of a stream.
struct DeliverOutputsEach {
  char* to;
  int64_t size;                // of all outputs, a multiple of a piece
  const MailedArrays* arrays;  // in the step's memory, where TakeInputsEach has put them
  int num_ports;
  MailedPort ports[kMostMailedPorts];
  const char* values[kMostMailedPorts];  // where the outputs are
  int64_t* positions;                    // [M]
  int64_t streams;                       // M

  __host__ __device__ int64_t Count() const {
    const int64_t pieces = size / kPieceBytes;
    return pieces > streams ? pieces : streams;
  }
  __device__ void operator()(int64_t i) const {
    if (i < streams) ++positions[i];
    const int64_t at = i * kPieceBytes;
    for (int p = 0; p < num_ports; ++p) {
      const int64_t within = at - ports[p].at;
      if (within < 0 || within >= ports[p].size) continue;
      char* const array = arrays->outputs[p];
      if (array == UnwantedOutput()) return;
      return CopyPiece(values[p] + within, array == nullptr ? to + at : array + within,
                       ports[p].size - within);
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
