#!/usr/bin/env bash
# Prepare a real text for train.sh: TEXT_DIR=/a/folder prepare.sh
#
# recipes/capacity/prepare.sh does it, with a larger vocabulary and a folder of its own: it takes the text, one sentence a
# line, apart into train, valid and test, learns sentencepiece's vocabulary on train and writes fairseq's data-bin. Finished
# steps are skipped; a changed variable repeats what depends on it. Variables:
#   TEXT_DIR     the folder that holds the text (no default)
#   TRAIN, TEST  its files, plain, .gz or .xz, without that ending (train.en, val.en)
#   VALID_LINES  last lines of TRAIN, kept back to watch the training (5000)
#   VOCAB_SIZE   pieces of the vocabulary (8000)
#   WORK         folder to write (recipes/captions/work)
#   THREADS      processes for binarising (1)
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
manual_if_asked "${1:-}"

export VOCAB_SIZE=${VOCAB_SIZE:-8000} WORK=${WORK:-$REPOSITORY/recipes/captions/work}
exec bash "$REPOSITORY/recipes/capacity/prepare.sh" "$@"
