// The files of the page, which tools/embed.py puts into the program.

#ifndef CONTINUAL_TRANSFORMERS_SERVER_PAGE_H_
#define CONTINUAL_TRANSFORMERS_SERVER_PAGE_H_

#include <string_view>

namespace continual_transformers::server {

// The contents of a file of cc/server/page, by name: "index.html". Empty: there is no such file.
std::string_view PageFile(std::string_view name);

}  // namespace continual_transformers::server

#endif  // CONTINUAL_TRANSFORMERS_SERVER_PAGE_H_
