#!/usr/bin/env bash
# Create the project's environment: .venv in the repository, with the versions of tools/constraints.txt.
#
# Usage: bash tools/setup.sh [--help]
#
# The first run downloads torch and compiles fairseq's fast loops and the project's own, which takes two minutes and needs
# a C++ compiler. Later runs only check the environment, which takes seconds. After an interruption, the next run repairs
# the environment. The project itself is installed in editable mode, so changes to the code take effect immediately.
# `--user-dir nmt_moe` works in the repository's folder; elsewhere, use the path of the folder nmt_moe.
#
# Environment variables:
#   NMT_MOE_PYTHON  a Python that already has everything; it is checked and used as it is, and nothing is installed
#   PYTHON          the Python 3.11 or 3.12 that creates .venv (default: the first one on PATH)
#   PIP_*           pip's own settings; PIP_INDEX_URL, for instance, names another package index
set -euo pipefail

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=$ROOT/.venv
STAMPS=$VENV/.setup
LOG=$STAMPS/pip.log
STEPS=7

say() { printf '%s\n' "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

print_manual() { awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "${BASH_SOURCE[0]}"; }

# Print why a Python cannot create .venv, or nothing if it can.
refusal_of_python() {
  "$1" - 2>/dev/null <<'PYTHON' || echo "does not run"
import sys
if not (3, 11) <= sys.version_info[:2] <= (3, 12):
    print("is Python %d.%d" % sys.version_info[:2])
else:
    try:
        import ensurepip, venv
    except ImportError:
        print("has no venv module (Debian: apt-get install python3-venv)")
PYTHON
}

find_python() {
  local candidate refusal refusals=""
  for candidate in ${PYTHON:+"$PYTHON"} python3.11 python3.12 python3 python; do
    command -v "$candidate" >/dev/null || {
      [[ $candidate != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON is not a program"
      continue
    }
    refusal=$(refusal_of_python "$candidate")
    if [[ -z $refusal ]]; then
      command -v "$candidate"
      return
    fi
    [[ $candidate != "${PYTHON:-}" ]] || die "PYTHON=$PYTHON $refusal; Python 3.11 or 3.12 is needed"
    refusals+="; $candidate $refusal"
  done
  die "Python 3.11 or 3.12 is needed, but is not on PATH${refusals}. Install one, or name it: PYTHON=/path/to/python3.11"
}

# check_environment PYTHON FLAG...: name the project's requirements, read from setup.cfg, that PYTHON lacks.
check_environment() {
  local python=$1 missing
  shift
  missing=$("$python" -c 'from importlib.util import find_spec as find
print(*(name for name in ("click", "packaging") if find(name) is None))')
  [[ -z $missing ]] || {
    echo "$python lacks $missing, so it cannot be checked. It probably lacks more of setup.cfg's requirements" >&2
    return 1
  }
  PYTHONPATH=$ROOT "$python" -m nmt_moe.cli check-environment "$@" >/dev/null
}

# use_given PYTHON: check an environment chosen by the user.
use_given() {
  local python
  python=$(command -v "$1") || die "NMT_MOE_PYTHON=$1 is not a program"
  check_environment "$python" --extra demo ||
    die "NMT_MOE_PYTHON is used as it is: install what is missing, or unset it to let tools/setup.sh create .venv"
  say "using $python as it is"
}

digest() { { sha256sum 2>/dev/null || shasum -a 256; } | cut -c1-64; }

# key_of_inputs: print a digest of everything that determines the contents of .venv.
key_of_inputs() {
  (
    cd "$ROOT"
    cat setup.cfg pyproject.toml tools/setup.sh tools/constraints.txt tools/fairseq-requirements*.txt \
      tools/fairseq_build/torch/utils/cpp_extension.py nmt_moe/kernels/_cpu/*.{py,h,cpp}
    "$VENV/bin/python" -VV
    pwd
  ) | digest
}

environment_works() { check_environment "$VENV/bin/python" --extra demo --extra docs --extra dev; }

pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

# step NUMBER TEXT COMMAND...: run a step unless its stamp says that it succeeded with the same inputs.
# An interrupted step may have left a partly installed package, so it is repeated from scratch (AGAIN).
step() {
  local number=$1 text=$2
  shift 2
  local stamp=$STAMPS/step-$number started=$STAMPS/step-$number.started
  if [[ -f $stamp && $(<"$stamp") == "$KEY" ]]; then
    say "[$number/$STEPS] $text: already done"
    return
  fi
  say "[$number/$STEPS] $text"
  AGAIN=()
  [[ ! -f $started ]] || AGAIN=(--ignore-installed)
  touch "$started"
  "$@" >"$LOG" 2>&1 || {
    tail -n 25 "$LOG" >&2
    die "step $number of the set-up failed ($text); the whole log is $LOG. Run this again to resume at this step"
  }
  rm -f "$started"
  printf '%s' "$KEY" >"$stamp"
}

make_venv() {
  local python
  # Commands in a moved environment still refer to the old place.
  if "$VENV/bin/python" -m pip --version >/dev/null 2>&1 && [[ -z $(refusal_of_python "$VENV/bin/python") ]] &&
    [[ ! -f $STAMPS/place || $(<"$STAMPS/place") == "$VENV" ]]; then
    return
  fi
  python=$(find_python)
  say "[1/$STEPS] creating $VENV from $python ($("$python" -V))"
  [[ ! -e $VENV || -f $VENV/pyvenv.cfg || -d $STAMPS ]] || die "$VENV exists but is not a virtual environment; move it away"
  "$python" -m venv --clear "$VENV"
}

install_build_tools() {
  pip install ${AGAIN[@]+"${AGAIN[@]}"} -c "$ROOT/tools/constraints.txt" setuptools wheel Cython numpy
}

install_torch() { pip install ${AGAIN[@]+"${AGAIN[@]}"} -c "$ROOT/tools/constraints.txt" torch; }

install_fairseq_needs() {
  pip install ${AGAIN[@]+"${AGAIN[@]}"} -c "$ROOT/tools/constraints.txt" -r "$ROOT/tools/fairseq-requirements-runtime.txt"
}

# If CUDA_HOME were set, fairseq would need CUDA sources that its archive lacks. Only a part of fairseq is built (see
# tools/fairseq_build), so the result must not get into pip's cache, which other projects use.
build_fairseq() {
  command -v "${CXX:-c++}" || command -v g++ || {
    echo "fairseq needs a C++ compiler, but none is installed (Debian: apt-get install g++)"
    return 1
  }
  local arguments=(--no-deps --no-build-isolation --require-hashes --no-cache-dir)
  env -u CUDA_HOME PYTHONPATH="$ROOT/tools/fairseq_build" "$VENV/bin/python" -m pip --disable-pip-version-check \
    --no-input install ${AGAIN[@]+"${AGAIN[@]}"} "${arguments[@]}" -r "$ROOT/tools/fairseq-requirements.txt"
}

install_project() {
  pip install ${AGAIN[@]+"${AGAIN[@]}"} -c "$ROOT/tools/constraints.txt" --no-build-isolation -e "${ROOT}[demo,docs,dev]"
}

# Without the compiled loops, torch's operations do the same more slowly, so a failure is not fatal.
compile_loops() {
  (cd "$ROOT" && "$VENV/bin/python" -m nmt_moe.kernels._cpu.build) ||
    printf 'note: the compiled loops were left out, so training and translation are slower on the CPU; see %s\n' "$LOG" >&3
}

run_steps() {
  exec 3>&1
  step 2 "installing the build tools" install_build_tools
  step 3 "installing torch (the largest download)" install_torch
  step 4 "installing fairseq's libraries" install_fairseq_needs
  step 5 "building fairseq (about a minute, once)" build_fairseq
  step 6 "installing nmt_moe and the development tools" install_project
  step 7 "compiling loops for the CPU (half a minute, once)" compile_loops
}

main() {
  case ${1:-} in
    "") ;;
    -h | --help)
      print_manual
      return
      ;;
    *) die "unknown argument '$1'; see --help" ;;
  esac
  if [[ -n ${NMT_MOE_PYTHON:-} ]]; then
    use_given "$NMT_MOE_PYTHON"
    return
  fi
  # An inherited PYTHONPATH or PYTHONHOME must have no effect.
  unset PYTHONPATH PYTHONHOME
  if [[ -x $VENV/bin/python && -f $STAMPS/complete && $(<"$STAMPS/complete") == "$(key_of_inputs)" ]]; then
    if environment_works; then
      say "the environment is complete: $VENV"
      return
    fi
    say "repairing the environment"
    rm -f "$STAMPS"/step-* "$STAMPS/complete"
  fi
  make_venv
  mkdir -p "$STAMPS"
  printf '%s' "$VENV" >"$STAMPS/place"
  # Two concurrent set-ups would interfere with each other.
  if command -v flock >/dev/null; then
    exec 9>"$STAMPS/lock"
    flock -n 9 || {
      say "another set-up is running; waiting for it"
      flock 9
    }
  fi
  KEY=$(key_of_inputs)
  run_steps
  environment_works || die "the environment is still incomplete; delete $VENV and run this again"
  printf '%s' "$KEY" >"$STAMPS/complete"
  say "the environment is complete: $VENV"
}

main "$@"
