#!/usr/bin/env bash
# Run all checks: style, format, import contracts, types, shell scripts and tests; the tests also build the documentation.
#
# Usage: bash tools/check.sh [--help] [PYTEST ARGUMENTS...]
#
# All checks run, even if one fails; the last line names the failed checks. The script uses the environment that
# tools/setup.sh creates, or the one that NMT_MOE_PYTHON names, which must also have the packages of setup.cfg's extra "dev".
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "${BASH_SOURCE[0]}"
  exit 0
fi

bash "$ROOT/tools/setup.sh"
if [[ -n ${NMT_MOE_PYTHON:-} ]]; then
  python=$(command -v "$NMT_MOE_PYTHON")
  PYTHONPATH=$ROOT "$python" -m nmt_moe.cli check-environment --extra demo --extra docs --extra dev
else
  python=$ROOT/.venv/bin/python
fi
bin=$(dirname "$python")
cd "$ROOT"

failed=()

check() {
  local name=$1
  shift
  printf '\n== %s\n' "$name"
  "$@" || failed+=("$name")
}

check_shell_scripts() {
  local scripts=() script
  while IFS= read -r script; do # not mapfile, which macOS' bash 3.2 lacks
    scripts+=("$script")
  done < <(find . -name .venv -prune -o -name work -prune -o -name '*.sh' -print | sort)
  "$bin/shellcheck" -x "${scripts[@]}" .ci/run
}

check style "$python" -m ruff check .
check format "$python" -m ruff format --check .
check imports env PYTHONPATH="$ROOT" "$bin/lint-imports"
check types "$python" -m mypy
check shell check_shell_scripts
check tests bash tools/test.sh "$@"

if ((${#failed[@]})); then
  printf '\nfailed: %s\n' "${failed[*]}" >&2
  exit 1
fi
printf '\nall checks passed\n'
