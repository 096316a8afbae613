"""Write a C++ source that has the files of the server's page: `embed.py OUTPUT.cc FILE...`."""

import sys
from pathlib import Path

BEGIN = """// Written by tools/embed.py.

#include "cc/server/page.h"

namespace continual_transformers::server {
namespace {

"""


def source(files: list[Path]) -> str:
    """Return the C++ source. Its function PageFile finds each file by its name."""
    text = BEGIN
    for i, file in enumerate(files):
        # Numbers, because compilers limit the length of a string literal.
        numbers = ",".join(str(byte) for byte in file.read_bytes())
        text += f"constexpr unsigned char kFile{i}[] = {{{numbers}}};\n"
    text += "\n}  // namespace\n\nstd::string_view PageFile(std::string_view name) {\n"
    for i, file in enumerate(files):
        text += (
            f'  if (name == "{file.name}")\n'
            f"    return {{reinterpret_cast<const char*>(kFile{i}), sizeof(kFile{i})}};\n"
        )
    return text + "  return {};\n}\n\n}  // namespace continual_transformers::server\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(source([Path(name) for name in sys.argv[2:]]), encoding="ascii")
