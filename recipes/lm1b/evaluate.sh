#!/usr/bin/env bash
# Compute the perplexity of a trained model on the benchmark's held-out shard: evaluate.sh
#
# All words and end marks count; each sentence starts from an empty state, because the benchmark's sentences are shuffled.
#   RUN         the run of train.sh (MODEL-seedSEED)
#   CHECKPOINT  the model (RUN's checkpoint_last.pt)
#   SUBSET      test (default: news.en.heldout-00000-of-00050) or valid
#   MAX_TOKENS  words in a batch (512); for each word, all 793,471 logits are computed
#   SLICE, MODEL, SEED, DEVICE, WORK as in train.sh
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/lm1b
manual_if_asked "${1:-}"

SLICE=${SLICE:-0}
require_choice SLICE 0 1
if [[ $SLICE == 1 ]]; then
  WORK=${WORK:-$HERE/work/slice}
  MODEL=${MODEL:-lstm_moe_lm_32}
fi
WORK=${WORK:-$HERE/work/full}
RUN=${RUN:-${MODEL:-lstm_moe_lm_4096h}-seed${SEED:-1}}
CHECKPOINT=${CHECKPOINT:-$WORK/$RUN/checkpoint_last.pt}
SUBSET=${SUBSET:-test}
MAX_TOKENS=${MAX_TOKENS:-512}
DEVICE=${DEVICE:-auto}

(($# == 0)) || die "evaluate.sh takes no arguments except --help, but was given '$1'"
require_choice SUBSET test valid
check_settings
[[ -f $CHECKPOINT ]] ||
  die "$CHECKPOINT is missing: train it with 'RUN=$RUN bash recipes/lm1b/train.sh', or set RUN, WORK or CHECKPOINT"
use_environment
set_device
log=$WORK/$RUN/$SUBSET.log
mkdir -p "$(dirname "$log")"
logged "$log" fairseq-eval-lm "$WORK/data-bin" --user-dir "$REPOSITORY/nmt_moe" --path "$CHECKPOINT" --gen-subset "$SUBSET" \
  --sample-break-mode eos --max-tokens "$MAX_TOKENS" --num-workers 0 "${EVERY_SENTENCE[@]}" "${DEVICE_FLAGS[@]}"
found=$(python "$REPOSITORY/recipes/logs.py" loss "$log")
read -r loss tokens <<<"$found"
expected=$(awk -v part="$SUBSET" '$1 == part { print $2 + $3 }' "$WORK/text/counts.tsv")
[[ $tokens == "$expected" ]] ||
  die "$SUBSET must have $expected words and end marks, as its text does, but $tokens were scored; log: $log"
printf '%s, %s: perplexity %s over %s words, including end marks\n' "$SUBSET" "$RUN" \
  "$(awk "BEGIN { printf \"%.2f\", 2 ^ $loss }")" "$tokens" | tee "$WORK/$RUN/$SUBSET.txt"
export_bundle "$CHECKPOINT" "$WORK/$RUN/bundle" --data "$WORK/data-bin" --scores "$WORK/$RUN/$SUBSET.txt"
