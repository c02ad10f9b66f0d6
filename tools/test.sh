#!/usr/bin/env bash
# Set up the environment and run the whole test suite.
#
# Usage: bash tools/test.sh [--help] [PYTEST ARGUMENTS...]
#   bash tools/test.sh                                     all tests except slow ones and those that need a GPU
#   bash tools/test.sh tests/moe -n 0                      one folder, in one process
#   bash tools/test.sh -m "slow and not gpu and not multigpu"   the slow tests
#   bash tools/test.sh -m gpu -n 0                         all GPU tests, on a machine with a GPU
#
# Environment variables:
#   NMT_MOE_PYTHON   a Python that already has everything (see tools/setup.sh), including pytest, pytest-timeout and pytest-xdist
#   OMP_NUM_THREADS  threads per test process (default 1, because more threads would slow down tests that start several processes)
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "${BASH_SOURCE[0]}"
  exit 0
fi

bash "$ROOT/tools/setup.sh"
if [[ -n ${NMT_MOE_PYTHON:-} ]]; then
  python=$(command -v "$NMT_MOE_PYTHON")
  PYTHONPATH=$ROOT "$python" -m nmt_moe.cli check-environment --extra demo --extra docs --extra test
else
  python=$ROOT/.venv/bin/python
fi

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
cd "$ROOT"
# Test files are distributed among processes, one per core but at most four, because each needs 2 GB.
exec "$python" -m pytest --numprocesses auto --maxprocesses 4 --dist loadfile "$@"
