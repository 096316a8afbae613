#!/usr/bin/env bash
# Writes build/offline.bazelrc, the part of --config=offline that points into this checkout.
set -euo pipefail
offline=$(cd "$(dirname "$0")" && pwd)
target=$offline/../../build/offline.bazelrc
mkdir -p "$(dirname "$target")"
for repository in benchmark:com_google_benchmark googletest:com_google_googletest remote_coverage_tools rules_cc; do
  echo "build:offline --override_repository=${repository#*:}=$offline/${repository%%:*}"
done >"$target"
