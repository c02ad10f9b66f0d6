#!/usr/bin/env bash
# Prepare a real text for run.sh: TEXT_DIR=/a/folder prepare.sh
#
# This script splits a text with one sentence per line into train, valid and test, learns a sentencepiece vocabulary on
# train, and writes fairseq's data-bin. Finished steps are skipped; changing a variable repeats the steps that depend on it.
# Variables:
#   TEXT_DIR     the folder with the text (no default)
#   TRAIN, TEST  its files, plain, .gz or .xz, named without .gz or .xz (train.en, val.en); TRAIN may name several
#   VALID        another file, on which the dropout is chosen; if empty (default), the last VALID_LINES (5000) lines of TRAIN
#   VOCAB_SIZE   pieces in the vocabulary (2000)
#   WORK         output folder (recipes/capacity/work)
#   THREADS      processes for binarising (1)
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/capacity
manual_if_asked "${1:-}"

TEXT_DIR=${TEXT_DIR:-}
TRAIN=${TRAIN:-train.en}
TEST=${TEST:-val.en}
VALID=${VALID:-}
VALID_LINES=${VALID_LINES:-5000}
VOCAB_SIZE=${VOCAB_SIZE:-2000}
WORK=${WORK:-$HERE/work}
THREADS=${THREADS:-1}

split_text() {
  local name trains=()
  for name in $TRAIN; do trains+=(--train "$name"); done
  python "$HERE/split_text.py" --folder "$TEXT_DIR" "${trains[@]}" --test "$TEST" --valid "$VALID" \
    --valid-lines "$VALID_LINES" --output "$WORK/text"
}

learn_pieces() {
  nmt-moe pieces train --vocab-size "$VOCAB_SIZE" --model "$WORK/spm.model" \
    --dictionary "$WORK/dict.txt" --inputs "$WORK/text/train"
}

cut_texts() {
  mkdir -p "$WORK/pieces"
  nmt-moe pieces encode --model "$WORK/spm.model" --inputs "$WORK/text"/{train,valid,test} \
    --outputs "$WORK/pieces"/{train,valid,test}
}

binarise() {
  rm -rf "$WORK/data-bin"
  logged "$WORK/preprocess.log" fairseq-preprocess --only-source --trainpref "$WORK/pieces/train" --validpref "$WORK/pieces/valid" \
    --testpref "$WORK/pieces/test" --srcdict "$WORK/dict.txt" --destdir "$WORK/data-bin" --workers "$THREADS"
}

(($# == 0)) || die "prepare.sh takes no arguments except --help, but was given '$1'"
[[ -n $TEXT_DIR ]] || die "TEXT_DIR must name the folder with the text, but is empty"
check_settings
use_environment
key=$(step_key "" split "$TEXT_DIR $TRAIN $TEST $VALID $VALID_LINES")
run_step "$WORK" split "$key" split_text
key=$(step_key "$key" learn-pieces "$VOCAB_SIZE")
run_step "$WORK" learn-pieces "$key" learn_pieces
key=$(step_key "$key" cut "")
run_step "$WORK" cut "$key" cut_texts
key=$(step_key "$key" binarise "")
run_step "$WORK" binarise "$key" binarise
# run.sh continues only with the text that it started with.
printf '%s' "$key" >"$WORK/prepared"
