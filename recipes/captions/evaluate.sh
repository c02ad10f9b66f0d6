#!/usr/bin/env bash
# Compute the perplexity of a trained model on valid and test: evaluate.sh
#
# All pieces and end marks count; each sentence starts from an empty state. The script prints perplexity per piece and per
# word, and bits per character, so that models with different vocabularies can be compared. Variables:
#   RUN         the run of train.sh (MODEL-seedSEED)
#   CHECKPOINT  the model (RUN's average.pt)
#   MAX_TOKENS  pieces in a batch (4000)
#   MODEL, SEED, WORK, DEVICE, THREADS as in train.sh
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/captions
manual_if_asked "${1:-}"

RUN=${RUN:-${MODEL:-moe}-seed${SEED:-1}}
WORK=${WORK:-$HERE/work}
CHECKPOINT=${CHECKPOINT:-$WORK/$RUN/average.pt}
MAX_TOKENS=${MAX_TOKENS:-4000}
DEVICE=${DEVICE:-auto}
THREADS=${THREADS:-1}

score() { # SUBSET
  local found bits scored figures log=$WORK/$RUN/$1.log
  OMP_NUM_THREADS=$THREADS logged "$log" fairseq-eval-lm "$WORK/data-bin" --user-dir "$REPOSITORY/nmt_moe" \
    --path "$CHECKPOINT" --gen-subset "$1" --sample-break-mode eos --max-tokens "$MAX_TOKENS" --num-workers 0 \
    "${EVERY_SENTENCE[@]}" "${DEVICE_FLAGS[@]}"
  found=$(python "$REPOSITORY/recipes/logs.py" loss "$log")
  read -r bits scored <<<"$found"
  figures=$(python "$HERE/score.py" --bits "$bits" --scored "$scored" --pieces "$WORK/pieces/$1" --text "$WORK/text/$1")
  printf '%s, %s: %s\n' "$1" "$RUN" "$figures"
}

(($# == 0)) || die "evaluate.sh takes no arguments except --help, but was given '$1'"
check_settings
[[ -f $CHECKPOINT ]] ||
  die "$CHECKPOINT is missing: train it with 'RUN=$RUN bash recipes/captions/train.sh', or set RUN, WORK or CHECKPOINT"
use_environment
set_device
mkdir -p "$WORK/$RUN"
for subset in valid test; do score "$subset"; done | tee "$WORK/$RUN/scores.txt"
export_bundle "$CHECKPOINT" "$WORK/$RUN/bundle" --data "$WORK/data-bin" --pieces "$WORK/spm.model" \
  --scores "$WORK/$RUN/scores.txt"
