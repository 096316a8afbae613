#include "cuda/session/mailbox.h"

#include <cstdint>
#include <memory>
#include <utility>
#include <vector>

namespace continual_transformers {
namespace {

int64_t Align(int64_t bytes) { return (bytes + kPieceBytes - 1) / kPieceBytes * kPieceBytes; }

}  // namespace

bool Mailbox::Fits(int64_t sent, const std::vector<MailedPort>& inputs,
                   const std::vector<MailedPort>& outputs) {
  return inputs.size() <= kMostMailedPorts && outputs.size() <= kMostMailedPorts &&
         sent <= kMostBytes && MailedBytes(outputs) <= kMostBytes;
}

Mailbox::Mailbox(std::shared_ptr<const Gpu> gpu)
    : memory_(std::move(gpu), GpuBytes::Kind::kPinnedHost, 2 * kMostBytes, "a step") {}

std::vector<MailedPort> MailedPortsOf(const std::vector<int64_t>& sizes) {
  std::vector<MailedPort> ports;
  for (int64_t size : sizes) ports.push_back({MailedBytes(ports), size});
  return ports;
}

int64_t MailedBytes(const std::vector<MailedPort>& ports) {
  return ports.empty() ? 0 : Align(ports.back().at + ports.back().size);
}

}  // namespace continual_transformers
