// Hashes of plans and weights. See docs/model_file.md.

#ifndef CONTINUAL_TRANSFORMERS_SESSION_FINGERPRINT_H_
#define CONTINUAL_TRANSFORMERS_SESSION_FINGERPRINT_H_

#include <cstddef>
#include <cstdint>
#include <string>

namespace continual_transformers {

// XXH64 of bytes, as https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md defines it: the
// same on every machine, and several GB/s. Not cryptographic: it finds mistakes, not forgeries.
uint64_t Xxh64(const void* data, size_t bytes, uint64_t seed = 0);

// Collects what is hashed. Every entry says how long it is, so that no two lists have the same
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
