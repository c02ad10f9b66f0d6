#!/usr/bin/env bash
# Build the documentation. Warnings and broken internal links count as errors.
#
# Usage: bash tools/docs.sh [--help] [FOLDER]
#
# The pages are written to FOLDER (build/docs). Open FOLDER/docs/index.html in a browser.
#
# Environment variables:
#   NMT_MOE_PYTHON  a Python that already has everything (see tools/setup.sh), including setup.cfg's extra "docs"
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "${BASH_SOURCE[0]}"
  exit 0
fi

bash "$ROOT/tools/setup.sh"
if [[ -n ${NMT_MOE_PYTHON:-} ]]; then
  python=$(command -v "$NMT_MOE_PYTHON")
  PYTHONPATH=$ROOT "$python" -m nmt_moe.cli check-environment --extra docs
else
  python=$ROOT/.venv/bin/python
fi

output=${1:-$ROOT/build/docs}
"$python" -m sphinx --builder html --conf-dir "$ROOT/docs" --fail-on-warning --fresh-env --quiet "$ROOT" "$output"
printf 'built: %s/docs/index.html\n' "$output"
