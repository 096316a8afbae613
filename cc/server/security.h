// What protects the server's ports: TLS, and a token that requests must carry.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SECURITY_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SECURITY_H_

#include <string>
#include <string_view>

namespace continual_transformers::server {

struct Security {
  // PEM texts. Empty: no TLS. With client_ca, clients need a certificate that it signed (mTLS).
  std::string certificate, key, client_ca;
  std::string token;  // empty: requests need none

  // Reads the files that are named. Throws Error (kIo) if one cannot be read, or kInvalidArgument
  // if the token is empty or one of certificate and key is missing.
  static Security Read(const std::string& certificate_file, const std::string& key_file,
                       const std::string& client_ca_file, const std::string& token_file);

  bool tls() const { return !certificate.empty(); }
  // Whether a request with this `authorization` header ("Bearer ...") may pass. Takes the same time
  // wherever a wrong token differs.
  bool Allows(std::string_view authorization) const;
};

// The sentence for a request that may not pass.
inline constexpr char kNeedsToken[] =
    "the request has no valid token: send the header \"authorization: Bearer TOKEN\" with the "
    "token "
    "of the server's --token-file";

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SECURITY_H_
