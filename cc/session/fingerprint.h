// Hashes of plans and weights. See docs/model_file.md.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_FINGERPRINT_H_
#define CONTINUAL_TRANSFORMERS_SESSION_FINGERPRINT_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace continual_transformers {

// Returns the XXH64 of bytes, as defined at
// https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md. It is the same on every machine
// and runs at several GB/s. It is not cryptographic: it finds mistakes, not forgeries.
uint64_t Xxh64(const void* data, size_t bytes, uint64_t seed = 0);

// Collects the data to hash. Every entry includes its length, so that no two lists give the same
// bytes.
class Fingerprint {
 public:
  void Add(int64_t value);
  void Add(double value);
  void Add(const std::string& text);
  uint64_t Hash(uint64_t seed = 0) const { return Xxh64(bytes_.data(), bytes_.size(), seed); }

 private:
  std::string bytes_;
};

}  // namespace continual_transformers

#endif  // CONTINUAL_TRANSFORMERS_SESSION_FINGERPRINT_H_
