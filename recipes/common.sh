# Functions shared by all recipes. Source this file; do not run it: `source recipes/common.sh`.
# shellcheck shell=bash

if [[ -z ${BASH_VERSINFO[0]:-} || ${BASH_VERSINFO[0]}${BASH_VERSINFO[1]} -lt 44 ]]; then
  echo "error: the recipes need bash 4.4 or newer, but this is ${BASH_VERSION:-another shell}. On macOS: run 'brew install bash'" \
    "and start the script with the new bash: \$(brew --prefix)/bin/bash $0" >&2
  exit 1
fi
# Let a failure inside $(...) also end the script.
shopt -s inherit_errexit

REPOSITORY=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# Use one thread per process by default, because more threads than free cores slow small models down.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}
# glibc returns large blocks to the kernel when they are freed, so every training step has to get fresh pages. With many
# experts, this takes a third of the time of a step. These settings keep freed blocks (other C libraries ignore them).
export MALLOC_MMAP_MAX_=${MALLOC_MMAP_MAX_:-0} MALLOC_TRIM_THRESHOLD_=${MALLOC_TRIM_THRESHOLD_:-100000000000}
export MALLOC_TOP_PAD_=${MALLOC_TOP_PAD_:-100000000}
# Sort and handle characters in the same way on every machine.
export LC_ALL=C.UTF-8 PYTHONUTF8=1
export PYTHONPATH=$REPOSITORY${PYTHONPATH:+:$PYTHONPATH}

# By default, this option is 8, and fairseq drops the last batch of a pass if its size is not a multiple of 8. Up to 7
# sentences of a test set would be lost.
# shellcheck disable=SC2034
EVERY_SENTENCE=(--required-batch-size-multiple 1)
# The log format that train_logged and nmt-moe plot read.
# shellcheck disable=SC2034
LOG_FORMAT=(--log-format json)

say() { printf '%s  %s\n' "$(date +%H:%M:%S)" "$*"; }

die() {
  printf 'error: %s\n' "$*" >&2
  exit 1
}

# manual_if_asked [ARGUMENT]: for -h or --help, print the comment at the top of the started script, and exit.
manual_if_asked() {
  [[ ${1:-} == -h || ${1:-} == --help ]] || return 0
  awk 'NR == 1 { next } /^#/ { sub(/^# ?/, ""); print; next } { exit }' "$0"
  exit
}

# use_environment: put the commands of the project's environment (fairseq-train, sacrebleu, ...) on PATH.
# NMT_MOE_PYTHON=/path/to/python names a complete environment; otherwise tools/setup.sh makes .venv.
use_environment() {
  local python
  if [[ -n ${NMT_MOE_PYTHON:-} ]]; then
    python=$(command -v "$NMT_MOE_PYTHON") || die "NMT_MOE_PYTHON=$NMT_MOE_PYTHON is not a program"
  else
    say "checking the environment (the first time, this compiles fairseq and takes minutes)"
    bash "$REPOSITORY/tools/setup.sh" || die "tools/setup.sh failed; its output above says why"
    python=$REPOSITORY/.venv/bin/python
  fi
  [[ -x $(dirname "$python")/fairseq-train ]] ||
    die "there is no fairseq-train beside $python: run 'bash tools/setup.sh', or set NMT_MOE_PYTHON to the Python of a complete environment"
  PATH=$(dirname "$python"):$PATH
  # Scripts called by this one need not check the environment again.
  NMT_MOE_PYTHON=$python
  export PATH NMT_MOE_PYTHON
}

# nmt-moe COMMAND...: run the project's command, even if it is not installed.
nmt-moe() { python -m nmt_moe.cli "$@"; }

# export_bundle CHECKPOINT FOLDER ARGUMENT...: write a model as a bundle, which can be used without fairseq and its data.
export_bundle() {
  nmt-moe export "$1" --output "$2" --overwrite "${@:3}" >/dev/null
  say "exported: $2"
}

# digest: print the SHA-256 hash of standard input.
digest() { { sha256sum 2>/dev/null || shasum -a 256; } | cut -c1-64; }

# step_key PREVIOUS NAME SETTINGS: print the key of a step that follows the step with the key PREVIOUS (empty for the first).
step_key() { printf '%s|%s|%s' "$1" "$2" "$3" | digest; }

# run_step FOLDER NAME KEY COMMAND...: run COMMAND unless FOLDER/.steps/NAME says that a step with the same KEY (the same
# settings after the same earlier steps) has succeeded. A second run therefore continues where the first failed, and a
# changed setting repeats its step and all later ones. With DRY_RUN=1, COMMAND is only printed.
run_step() {
  local stamp=$1/.steps/$2 name=$2 key=$3
  shift 3
  if [[ -f $stamp && $(<"$stamp") == "$key" ]]; then
    say "$name: already done"
    return
  fi
  if [[ ${DRY_RUN:-0} == 1 ]]; then
    say "$name: would run"
    show_command "$@"
    return
  fi
  say "$name"
  mkdir -p "$(dirname "$stamp")"
  rm -f "$stamp"
  "$@"
  printf '%s' "$key" >"$stamp"
}

# show_command COMMAND...: print a command in a form that can be pasted.
show_command() {
  printf '    '
  printf ' %q' "$@"
  printf '\n'
}

# require_whole NAME SMALLEST: reject a variable that is not a whole number of at least SMALLEST.
require_whole() {
  [[ ${!1} =~ ^[0-9]{1,9}$ && $((10#${!1})) -ge $2 ]] || die "$1 must be a whole number of at least $2, but is '${!1}'"
}

# require_choice NAME CHOICE...: reject a variable that is not one of the choices.
require_choice() {
  local name=$1 choice choices
  shift
  for choice; do [[ ${!name} == "$choice" ]] && return; done
  choices=$(printf ', %s' "$@")
  die "$name must be one of ${choices:2}, but is '${!name}'"
}

# require_number NAME: reject a variable that is not a decimal number of at least 0, such as 0.01 or 1e-2.
require_number() {
  [[ ${!1} =~ ^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$ ]] || die "$1 must be a number of at least 0, but is '${!1}'"
}

# require_positive NAME: reject a variable that is not a number above 0.
require_positive() {
  [[ ${!1} =~ ^[0-9]*\.?[0-9]+([eE][-+]?[0-9]+)?$ && ${!1%%[eE]*} =~ [1-9] ]] ||
    die "$1 must be a number above 0, but is '${!1}'"
}

# require_share NAME: reject a variable that is not at least 0 and below 1.
require_share() { [[ ${!1} =~ ^(0|0?\.[0-9]+)$ ]] || die "$1 must be at least 0 and below 1, but is '${!1}'"; }

# check_settings: reject impossible values of the variables that recipes share. Every script calls this function first.
check_settings() {
  local name
  for name in UPDATES EPOCHS MAX_TOKENS VALID_TOKENS BATCH_WORDS UPDATE_FREQ SAVE_INTERVAL AVERAGE THREADS GPUS NODES BEAM \
    BATCH_SIZE DIM MODEL_DIM LSTM_HIDDEN_DIM ENCODER_LAYERS DECODER_LAYERS NUM_EXPERTS TOP_K EXPERT_HIDDEN_DIM TRAIN_SIZE \
    TEST_SIZE VALID_LINES SAMPLE_PAIRS MAX_PIECES MAX_PAIRS SHARDS MIN_COUNT; do
    [[ -z ${!name+set} ]] || require_whole "$name" 1
  done
  for name in SEED NUM_GROUPS WARMUP_UPDATES HOLD_UPDATES SAMPLES NODE_RANK SHARD_LINES; do
    [[ -z ${!name+set} ]] || require_whole "$name" 0
  done
  [[ -z ${VOCAB_SIZE+set} ]] || require_whole VOCAB_SIZE 10
  for name in LEARNING_RATE INIT_RANGE TEMPERATURE; do [[ -z ${!name+set} ]] || require_positive "$name"; done
  for name in CLIP_NORM WEIGHT_DECAY IMPORTANCE_WEIGHT LOAD_WEIGHT SAMPLE_ALPHA LENPEN; do
    [[ -z ${!name+set} ]] || require_number "$name"
  done
  for name in DROPOUT LABEL_SMOOTHING; do [[ -z ${!name+set} ]] || require_share "$name"; done
  for name in EVALUATE AVERAGE_ONLY TIE_OUTPUT SLICE; do [[ -z ${!name+set} ]] || require_choice "$name" 0 1; done
  [[ -z ${DEVICE+set} ]] || require_choice DEVICE auto cpu cuda
  [[ -z ${AVERAGE+set} || -z ${UPDATES+set} || -z ${SAVE_INTERVAL+set} ]] || check_averaging
}

# check_averaging: reject settings that would give fewer than AVERAGE checkpoints.
check_averaging() {
  ((AVERAGE * SAVE_INTERVAL <= UPDATES)) ||
    die "AVERAGE x SAVE_INTERVAL = $((AVERAGE * SAVE_INTERVAL)) must not exceed UPDATES = $UPDATES; lower one of the two"
}

# require_multiple: require UPDATES to be a multiple of SAVE_INTERVAL, so that the last update has a checkpoint.
require_multiple() {
  ((UPDATES % SAVE_INTERVAL == 0)) || die "UPDATES = $UPDATES must be a multiple of SAVE_INTERVAL = $SAVE_INTERVAL"
}

# require_flags ARGUMENT...: reject arguments that do not begin with a flag.
require_flags() {
  (($# == 0)) || [[ $1 == -* ]] || die "$(basename "$0") takes fairseq-train flags, which begin with -, but was given '$1'"
}

# show_end LOG: print the end of a log on standard error.
show_end() { tail -n 15 "$1" >&2; }

# logged LOG COMMAND...: run a command with all output in LOG; show the end of LOG if the command fails.
logged() {
  local log=$1
  shift
  "$@" >"$log" 2>&1 || {
    show_end "$log"
    die "'$1' failed; the whole log is $log"
  }
}

# quietly COMMAND...: run a command that prints known warnings; show them only if it fails.
quietly() {
  local messages
  messages=$(mktemp)
  "$@" 2>"$messages" || {
    show_end "$messages"
    rm -f "$messages"
    die "'$1' failed"
  }
  rm -f "$messages"
}

# translate_logged OUTPUT ARGUMENT...: translate with fairseq-generate into OUTPUT, with the log beside it.
translate_logged() {
  local output=$1
  shift
  logged "$output.log" fairseq-generate "$@" --user-dir "$REPOSITORY/nmt_moe" --num-workers 0 "${EVERY_SENTENCE[@]}" \
    "${DEVICE_FLAGS[@]}"
  nmt-moe hypotheses "$output.log" >"$output"
}

# set_device: turn DEVICE (auto, cpu or cuda) into DEVICE_FLAGS for fairseq; auto uses a GPU if there is one.
# shellcheck disable=SC2034
set_device() {
  DEVICE_FLAGS=()
  if [[ $DEVICE == cpu ]]; then DEVICE_FLAGS=(--cpu); fi
  if [[ $DEVICE == cuda ]]; then
    python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' ||
      die "DEVICE=cuda, but torch finds no CUDA device; use DEVICE=auto or cpu to run on the CPU"
  fi
}

# train_logged LOG COMMAND...: append fairseq-train's output to LOG, and show one short line for each report. COMMAND
# must include LOG_FORMAT.
train_logged() {
  local log=$1
  shift
  "$@" 2>&1 | tee -a "$log" | python "$REPOSITORY/recipes/logs.py" progress || {
    show_end "$log"
    die "training failed; the whole log is $log. Run the same command again to resume from the last checkpoint."
  }
}

# keep_settings FOLDER SETTINGS [VARIABLE]: write SETTINGS to FOLDER/settings; refuse if FOLDER, named by VARIABLE (RUN),
# contains models or finished training runs with different settings.
keep_settings() {
  local folder=$1 settings=$2
  mkdir -p "$folder"
  if [[ -f $folder/settings && $(<"$folder/settings") != "$settings" ]] &&
    [[ -n $(find "$folder" \( -name '*.pt' -o -name 'done' \) -print -quit) ]]; then
    diff "$folder/settings" - <<<"$settings" >&2 || true
    die "$folder was trained with different settings or a different text (above: < then, > now). Choose another ${3:-RUN}, or remove it."
  fi
  if [[ -f $folder/settings && $(<"$folder/settings") != "$settings" && -s $folder/train.log ]]; then
    mv "$folder/train.log" "$folder/train.$(date +%Y%m%d-%H%M%S).log" # from a training run with different settings
  fi
  printf '%s\n' "$settings" >"$folder/settings"
}

# keep_or_clear FOLDER KEY: remove a training run with different settings from FOLDER, because it cannot be continued.
keep_or_clear() {
  if [[ -d $1 && $(cat "$1/settings" 2>/dev/null) != "$2" ]]; then
    say "the settings changed: removing $1"
    rm -rf "$1"
  fi
  mkdir -p "$1"
  printf '%s' "$2" >"$1/settings"
}
