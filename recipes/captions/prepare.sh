#!/usr/bin/env bash
# Prepare real text for train.sh: TEXT_DIR=/a/folder prepare.sh
#
# This script runs recipes/capacity/prepare.sh, which splits a text with one sentence per line into train, valid and test,
# learns a sentencepiece vocabulary on train, and writes fairseq's data-bin. Finished steps are skipped;
# changing a variable repeats the steps that depend on it. Variables:
#   TEXT_DIR     the folder with the text (no default)
#   TRAIN, TEST  its files, plain, .gz or .xz, named without .gz or .xz (train.en, val.en)
#   VALID_LINES  how many of the last lines of TRAIN are held out for validation (5000)
#   VOCAB_SIZE   pieces in the vocabulary (8000)
#   WORK         output folder (recipes/captions/work)
#   THREADS      processes for binarising (1)
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
manual_if_asked "${1:-}"

export VOCAB_SIZE=${VOCAB_SIZE:-8000} WORK=${WORK:-$REPOSITORY/recipes/captions/work}
exec bash "$REPOSITORY/recipes/capacity/prepare.sh" "$@"
