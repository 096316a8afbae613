#!/usr/bin/env bash
# Builds the server on a bare Debian 12, and puts its files into a folder:
#
#     deploy/install.sh /opt/continual-transformers
#
# The folder has the program and the shared objects that it needs. It needs no Python.
set -euo pipefail
target=$(realpath --canonicalize-missing "$1")
cd "$(dirname "$0")/.."

mapfile -t packages <tools/server_packages.txt
packages+=(g++ python3-dev python3-venv)
if ! dpkg --status "${packages[@]}" >/dev/null 2>&1; then
  sudo=$([ "$(id -u)" = 0 ] || echo sudo)
  $sudo apt-get update -qq
  $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"
fi

# No op library, which the server does not use. pip fetches TensorFlow's wheel for its headers.
work=$(mktemp --directory)
trap 'rm -r "$work"' EXIT
python3 -m venv "$work/venv"
CONTINUAL_TRANSFORMERS_SERVER=1 CONTINUAL_TRANSFORMERS_TENSORFLOW= \
  "$work/venv/bin/pip" wheel --quiet --no-deps --wheel-dir "$work" .
python3 -m zipfile --extract "$work"/*.whl "$work/wheel"

cd "$work/wheel/continual_transformers_tf"
install -D --target-directory "$target" continual-transformers-server libcontinual_transformers.so
# Debian has no archives of these.
find . -maxdepth 1 -name '*.so.*' -exec install --target-directory "$target" {} +
"$target/continual-transformers-server" --help >/dev/null
