# Shared by every recipe; to be sourced, not run: `source recipes/common.sh`.
# shellcheck shell=bash

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# One thread for each process unless the caller says otherwise: more threads than free cores slow small models down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# glibc gives large blocks back to the kernel when they are freed, and every training step pays for fresh pages again:
# a quarter of a small model's step. These keep what was freed (other C libraries ignore them).
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-100000000000}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-100000000}
# Makes sorting and character handling the same on every machine.
export LC_ALL=C.UTF-8 PYTHONUTF8=1

# fairseq drops the last batch of every pass whose size is no multiple of 8 (this option's default), and with it up to
# 7 sentences of a test set.
# shellcheck disable=SC2034
EVERY_SENTENCE=(--required-batch-size-multiple 1)
# What train_logged and tools/plot_runs.py read.
# shellcheck disable=SC2034
LOG_FORMAT=(--log-format json)

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# Print the comment block at the top of a recipe: its manual.
print_manual() { awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$1"; }

# use_environment: put the commands of the project's environment (fairseq-train, sacrebleu, ...) on PATH.
# NMT_MOE_PYTHON=/path/to/python names an environment that has everything; otherwise tools/setup.sh makes .venv.
use_environment() {
  local python
  if [[ -n ${NMT_MOE_PYTHON:-} ]]; then
    python=$(command -v "$NMT_MOE_PYTHON") || die "NMT_MOE_PYTHON=$NMT_MOE_PYTHON is not a program"
  else
    say "checking the environment (the first time this compiles fairseq, which takes minutes)"
    bash "$REPOSITORY/tools/setup.sh" || die "tools/setup.sh failed; its output above says why"
    python=$REPOSITORY/.venv/bin/python
  fi
  [[ -x $(dirname "$python")/fairseq-train ]] ||
    die "there is no fairseq-train beside $python: run 'bash tools/setup.sh', or set NMT_MOE_PYTHON to a complete one"
  PATH=$(dirname "$python"):$PATH
  export PATH
  export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}
}

# begin_steps FOLDER [KEY]: the steps that follow leave their stamps in FOLDER/.steps; KEY ties them to earlier work.
begin_steps() {
  STEPS_FOLDER=$1/.steps
  STEP_KEY=${2:-}
  [[ ${DRY_RUN:-0} == 1 ]] || mkdir -p "$STEPS_FOLDER"
}

# run_step NAME SETTINGS COMMAND...: run COMMAND unless its stamp says that the same step ended well with the same
# SETTINGS after the same earlier steps. So a second run goes on where the first failed, and a changed setting
# repeats its own step and all that follow. With DRY_RUN=1 it only prints what it would do.
run_step() {
  local name=$1 settings=$2 stamp=$STEPS_FOLDER/$1
  shift 2
  STEP_KEY=$(printf '%s|%s|%s' "$STEP_KEY" "$name" "$settings" | sha256sum | cut -c1-64)
  if [[ -f $stamp && $(<"$stamp") == "$STEP_KEY" ]]; then
    say "$name: done before"
    return
  fi
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    say "$name: would run"
    show_command "$@"
    return
  fi
  say "$name"
  rm -f "$stamp"
  "$@"
  printf '%s' "$STEP_KEY" >"$stamp"
}

# show_command COMMAND...: print a command as it could be typed.
show_command() {
  printf '    '
  printf ' %q' "$@"
  printf '\n'
}

# require_whole NAME SMALLEST: refuse a variable that is not a whole number of at least SMALLEST.
require_whole() {
  [[ ${!1} =~ ^[0-9]{1,9}$ && $((10#${!1})) -ge $2 ]] || die "$1 must be a whole number of at least $2, but is '${!1}'"
}

# require_choice NAME CHOICE...: refuse a variable that is none of the choices.
require_choice() {
  local name=$1 choice
  shift
  for choice; do [[ ${!name} == "$choice" ]] && return; done
  die "$name must be one of: $*; but is '${!name}'"
}

# require_positive NAME: refuse a variable that is not a number above 0, such as 0.01 or 1e-2.
require_positive() {
  [[ ${!1} =~ ^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$ && ${!1%%[eE]*} =~ [1-9] ]] ||
    die "$1 must be a number above 0, but is '${!1}'"
}

# require_flags ARGUMENT...: refuse arguments that do not begin with a flag.
require_flags() {
  (($# == 0)) || [[ $1 == -* ]] || die "$(basename "$0") takes flags of fairseq-train, which begin with -, not '$1'"
}

# hypotheses_of LOG: the detokenised translations in fairseq-generate's output, in the order of the test set.
hypotheses_of() { grep '^D-' "$1" | sed 's/^D-//' | sort -n -k1,1 | cut -f3-; }

# loss_of LOG: bits per token and how many tokens were scored, from fairseq-eval-lm's output, whose perplexity has only
# two digits.
loss_of() {
  local found
  found=$(sed -n -e 's/.*Evaluated \([0-9,]*\) tokens.*/tokens \1/p' -e 's/.*Loss (base 2): \([0-9.]*\).*/bits \1/p' "$1" |
    tr -d , | awk '{ last[$1] = $2 } END { if (("bits" in last) && ("tokens" in last)) print last["bits"], last["tokens"] }')
  [[ -n $found ]] || die "$1 holds no loss of fairseq-eval-lm; run evaluate.sh again"
  printf '%s\n' "$found"
}

# logged COMMAND... with LOG set: run with all output in $LOG; show its end when the command fails.
logged() {
  if ! "$@" >"$LOG" 2>&1; then
    tail -n 15 "$LOG" >&2
    die "'$1' failed; the whole log is $LOG"
  fi
}

# set_device: turn DEVICE (auto, cpu or cuda) into DEVICE_FLAGS for fairseq; auto takes a GPU when there is one.
# shellcheck disable=SC2034
set_device() {
  require_choice DEVICE auto cpu cuda
  DEVICE_FLAGS=()
  if [[ $DEVICE == cpu ]]; then DEVICE_FLAGS=(--cpu); fi
  if [[ $DEVICE == cuda ]]; then
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
      die "DEVICE=cuda, but torch finds no CUDA device here; DEVICE=auto or cpu runs on the processor"
  fi
}

# train_logged LOG COMMAND...: append fairseq-train's output to LOG and show of it one short line for each report. COMMAND
# must have LOG_FORMAT.
train_logged() {
  local log=$1
  shift
  if ! "$@" 2>&1 | tee -a "$log" | awk '
    function value(key, prefix) {
      if (!match($0, "\"" prefix key "\": [^,}]+")) return ""
      found = substr($0, RSTART, RLENGTH)
      gsub(/.*: |"/, "", found)
      return "  " key " " found
    }
    / \| train_inner \| \{/ { print "      " value("num_updates") value("ppl") value("wps") value("moe_cv_load") }
    / \| valid \| \{/ { print "valid:" value("num_updates", "valid_") value("ppl", "valid_") }
    { fflush() }'; then
    tail -n 15 "$log" >&2
    die "training failed; the whole log is $log. Run the same command again to go on from the last checkpoint."
  fi
}

# keep_settings FOLDER SETTINGS [VARIABLE]: write SETTINGS into FOLDER/settings; refuse others than those of the models or
# finished trainings that are in FOLDER, which VARIABLE (RUN) names. A training that left neither holds nobody to its settings.
keep_settings() {
  local folder=$1 settings=$2
  mkdir -p "$folder"
  if [[ -f $folder/settings && $(<"$folder/settings") != "$settings" ]] &&
    [[ -n $(find "$folder" \( -name '*.pt' -o -name 'done' \) -print -quit) ]]; then
    diff "$folder/settings" - <<<"$settings" >&2 || true
    die "$folder was trained with other settings or text (above: < then, > now). Choose another ${3:-RUN}, or remove it."
  fi
  printf '%s\n' "$settings" >"$folder/settings"
}

# keep_or_clear FOLDER KEY: a training with other settings cannot be continued; remove what it left.
keep_or_clear() {
  if [[ -d $1 && $(cat "$1/settings" 2>/dev/null) != "$2" ]]; then
    say "the settings changed: removing $1"
    rm -rf "$1"
  fi
  mkdir -p "$1"
  printf '%s' "$2" >"$1/settings"
}
