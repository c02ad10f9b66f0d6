#!/usr/bin/env bash
# Train language models of growing capacity at equal cost and compare them: TEXT_DIR=/a/folder run.sh
#
# This script prepares the text (prepare.sh and its variables), trains every model with every dropout and every seed, one
# after another, and writes WORK/table.md, WORK/capacity.png (perplexity on test with the dropout that is best on valid) and
# WORK/updates.png (perplexity on valid during training). Finished runs are not repeated, so seeds, dropouts and models
# can be added later; an interrupted run resumes from its last checkpoint. Variables:
#   MODELS     models to train ("lstm_4 moe_1_wide moe_1_deep moe_4 moe_16 moe_64 moe_256h"); moe_1024h is available too
#   DROPOUTS   dropouts to choose from for each model ("0.0 0.1")
#   SEEDS      seeds of parameters, the order of the text, dropout and the gates' noise ("1 2 3")
#   DIM        width of all layers (64)
#   UPDATES    updates of each run (2000)
#   SAVE_INTERVAL  updates between checkpoints; perplexity on valid and test is measured at each (500)
#   BREAK_MODE     with eos (default), a sample is a line; with none, it is BLOCK_SIZE pieces (64) across lines, which is
#                  better for the paragraphs of a book
#   WORK       output folder (recipes/capacity/work); use another for another DIM, UPDATES or text
#   DEVICE     auto (default: a GPU if there is one), cpu or cuda
#   THREADS    threads of a training process on the CPU (1)
# All other variables are explained below.
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/capacity
manual_if_asked "${1:-}"

MODELS=${MODELS:-lstm_4 moe_1_wide moe_1_deep moe_4 moe_16 moe_64 moe_256h}
DROPOUTS=${DROPOUTS:-0.0 0.1}
SEEDS=${SEEDS:-1 2 3}
DIM=${DIM:-64}
# Narrow layers need larger initial weights than the paper's layers, which have width 512 and start within +-0.04.
INIT_RANGE=${INIT_RANGE:-0.1}
# An update processes at most 1000 pieces (985 on average for captions of 16 pieces), so 2000 updates process 2 million.
MAX_TOKENS=${MAX_TOKENS:-1000}
UPDATES=${UPDATES:-2000}
# The rate rises and then falls linearly to 0 at the last update. With the paper's schedule, it would still be high then.
WARMUP_UPDATES=${WARMUP_UPDATES:-100}
LEARNING_RATE=${LEARNING_RATE:-0.01}
CLIP_NORM=${CLIP_NORM:-5.0}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
BREAK_MODE=${BREAK_MODE:-eos}
BLOCK_SIZE=${BLOCK_SIZE:-64}
WORK=${WORK:-$HERE/work}
DEVICE=${DEVICE:-auto}
THREADS=${THREADS:-1}

train_model() { # MODEL DROPOUT SEED
  local run=$WORK/runs/$1/dropout-$2/seed-$3 flags
  if [[ -f $run/done ]]; then
    say "$1, dropout $2, seed $3: already done"
    return
  fi
  say "$1, dropout $2, seed $3"
  flags=$(python "$HERE/capacity.py" flags "$1" --dim "$DIM")
  mkdir -p "$run"
  # shellcheck disable=SC2086
  OMP_NUM_THREADS=$THREADS train_logged "$run/train.log" fairseq-train "$WORK/data-bin" \
    --user-dir "$REPOSITORY/nmt_moe" --task language_modeling "${SAMPLES[@]}" --arch lstm_moe_lm $flags \
    --dropout "$2" --init-range "$INIT_RANGE" --criterion moe_cross_entropy --optimizer adam \
    --adam-betas '(0.9, 0.98)' --clip-norm "$CLIP_NORM" --lr "$LEARNING_RATE" --lr-scheduler polynomial_decay \
    --warmup-updates "$WARMUP_UPDATES" --total-num-update "$UPDATES" --max-update "$UPDATES" \
    --max-tokens "$MAX_TOKENS" --seed "$3" --num-workers 0 "${EVERY_SENTENCE[@]}" --save-dir "$run" \
    --save-interval-updates "$SAVE_INTERVAL" --keep-interval-updates 1 --no-epoch-checkpoints \
    --valid-subset valid,test --validate-interval 1000000 "${LOG_FORMAT[@]}" --log-interval 50 "${DEVICE_FLAGS[@]}"
  export_bundle "$run/checkpoint_last.pt" "$run/bundle" --data "$WORK/data-bin" --pieces "$WORK/spm.model"
  touch "$run/done"
}

(($# == 0)) || die "run.sh takes no arguments except --help, but was given '$1'"
check_settings
require_whole BLOCK_SIZE 1
require_choice BREAK_MODE eos none
SAMPLES=(--sample-break-mode "$BREAK_MODE")
[[ $BREAK_MODE == eos ]] || SAMPLES+=(--tokens-per-sample "$BLOCK_SIZE")
# shellcheck disable=SC2034
for SEED in $SEEDS; do require_whole SEED 0; done
# shellcheck disable=SC2034
for DROPOUT in $DROPOUTS; do require_share DROPOUT; done
[[ -n ${MODELS// /} && -n ${SEEDS// /} && -n ${DROPOUTS// /} ]] || die "MODELS, DROPOUTS and SEEDS must not be empty"
use_environment
export WORK
set_device
for model in $MODELS; do python "$HERE/capacity.py" flags "$model" --dim "$DIM" >/dev/null || exit 1; done
bash "$HERE/prepare.sh"
settings="text $(<"$WORK/prepared"), DIM $DIM, $INIT_RANGE, $MAX_TOKENS x $UPDATES, $WARMUP_UPDATES $LEARNING_RATE $CLIP_NORM, \
${SAMPLES[*]}"
keep_settings "$WORK" "$settings" WORK
for seed in $SEEDS; do
  for dropout in $DROPOUTS; do
    for model in $MODELS; do train_model "$model" "$dropout" "$seed"; done
  done
done
python "$HERE/capacity.py" report --work "$WORK" --dim "$DIM" --vocab-size "$(($(wc -l <"$WORK/dict.txt") + 4))"
say "table and figures: $WORK/table.md $WORK/capacity.png $WORK/updates.png"
