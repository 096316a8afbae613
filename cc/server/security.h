// What protects the server's ports: TLS, and a token that requests must carry.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_SECURITY_H_
#define CONTINUAL_TRANSFORMERS_SERVER_SECURITY_H_

#include <string>
#include <string_view>

namespace continual_transformers::server {

struct Security {
  // PEM texts. Empty: no TLS. With client_ca, clients need a certificate that it signed (mTLS).
  std::string certificate, key, client_ca;
  std::string token;           // empty: requests need none
  std::string operator_token;  // of the operator's calls; empty: the same

  // Reads the files that are named. Throws Error (kIo) if one cannot be read, or kInvalidArgument
  // if a file is empty or one of certificate and key is missing.
  static Security Read(const std::string& certificate_file, const std::string& key_file,
                       const std::string& client_ca_file, const std::string& token_file,
                       const std::string& operator_token_file);

  bool tls() const { return !certificate.empty(); }
  // Whether a request with this `authorization` header ("Bearer ...") may pass. Takes the same time
  // wherever a wrong token differs. The operator's token is good for everything.
  bool Allows(std::string_view authorization) const;
  bool AllowsOperator(std::string_view authorization) const;
  // Whether a request may load and unload models: one of the operator's. A server without any token
  // lets everyone do it, as Triton does.
  bool AllowsLoading(std::string_view authorization) const {
    return !knows_operator() || AllowsOperator(authorization);
  }
  // Whether there is a token by which to know the operator.
  bool knows_operator() const { return !token.empty() || !operator_token.empty(); }
};

// The sentence for a request that may not pass.
inline constexpr char kNeedsToken[] =
    "the request has no valid token: send the header \"authorization: Bearer TOKEN\" with the "
    "token of the server's --token-file (or --operator-token-file, for the operator's calls)";

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_SECURITY_H_
