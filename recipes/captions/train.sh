#!/usr/bin/env bash
# Train a language model on a real text and score it: TEXT_DIR=/a/folder train.sh [FLAG-OF-FAIRSEQ-TRAIN...]
#
# This script prepares the text (prepare.sh and its variables), trains or resumes the run from its last checkpoint, averages
# checkpoints and calls evaluate.sh. With the defaults, 140,000 captions take a quarter of an hour on one core.
#   MODEL   moe (default), or dense: one network in place of the experts, with the same number of operations per token
#   RUN     name of the run, a folder in WORK (MODEL-seedSEED); use a different name for different settings
#   SEED    seed of the parameters, the order of the text, dropout and the gates' noise (1)
#   WORK    output folder (recipes/captions/work)
#   DEVICE  auto (default: a GPU if there is one), cpu or cuda
#   THREADS threads of a training process on the CPU (1)
#   EVALUATE=0 stops after averaging
# All other variables are explained below.
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/captions
manual_if_asked "${1:-}"

MODEL=${MODEL:-moe}
SEED=${SEED:-1}
RUN=${RUN:-$MODEL-seed$SEED}
WORK=${WORK:-$HERE/work}
DEVICE=${DEVICE:-auto}
THREADS=${THREADS:-1}
EVALUATE=${EVALUATE:-1}
# The model has the shape of the paper's models, but is narrow: two LSTMs with the experts between them, all as wide as the
# embedding. The embedding is shared with the softmax layer, so there are fewer weights to learn from little text.
MODEL_DIM=${MODEL_DIM:-160}
# A token uses 4 experts, which together cost 8 x 160 x 320 multiplications, as much as both LSTMs.
NUM_EXPERTS=${NUM_EXPERTS:-16}
TOP_K=${TOP_K:-4}
EXPERT_HIDDEN_DIM=${EXPERT_HIDDEN_DIM:-320}
# Narrow layers need larger initial weights than the paper's layers, which have width 512 and start within +-0.04.
INIT_RANGE=${INIT_RANGE:-0.1}
# Dropout reduces overfitting, because the same two million pieces are seen more than three times.
DROPOUT=${DROPOUT:-0.1}
# How many samples to draw from the vocabulary during training; 0 means the full softmax over 8,000 pieces, which is slow.
# Scores always use the full softmax. sentencepiece lists its pieces by falling frequency, as sampling requires.
SAMPLES=${SAMPLES:-1000}
# An update has at most 2,000 pieces, 1,986 on average. 140,000 captions have 2.12 million pieces, so a pass has 1,067 updates.
MAX_TOKENS=${MAX_TOKENS:-2000}
# 3,600 updates are 3.4 passes. The rate rises and then falls linearly to 0. With the paper's schedule, it would still be high.
UPDATES=${UPDATES:-3600}
WARMUP_UPDATES=${WARMUP_UPDATES:-500}
LEARNING_RATE=${LEARNING_RATE:-0.004}
CLIP_NORM=${CLIP_NORM:-5.0}
# Every SAVE_INTERVAL updates, a checkpoint is saved and valid is scored; the last AVERAGE checkpoints are averaged.
SAVE_INTERVAL=${SAVE_INTERVAL:-200}
AVERAGE=${AVERAGE:-4}

set_model_flags() {
  MODEL_FLAGS=(--arch lstm_moe_lm --model-dim "$MODEL_DIM" --lstm-hidden-dim "$MODEL_DIM" --dropout "$DROPOUT"
    --init-range "$INIT_RANGE" --share-decoder-input-output-embed)
  if [[ $MODEL == moe ]]; then
    MODEL_FLAGS+=(--num-experts "$NUM_EXPERTS" --moe-top-k "$TOP_K" --expert-hidden-dim "$EXPERT_HIDDEN_DIM")
  else
    # The paper's MoE-1-Wide: one expert that costs as much as TOP_K experts.
    MODEL_FLAGS+=(--num-experts 1 --moe-top-k 1 --expert-hidden-dim $((TOP_K * EXPERT_HIDDEN_DIM)))
  fi
}

train_model() { # resumes automatically: fairseq looks for checkpoint_last.pt
  OMP_NUM_THREADS=$THREADS train_logged "$RUN_FOLDER/train.log" \
    fairseq-train "$WORK/data-bin" --user-dir "$REPOSITORY/nmt_moe" --task language_modeling \
    --sample-break-mode eos "${MODEL_FLAGS[@]}" --criterion moe_cross_entropy --sampled-softmax "$SAMPLES" \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm "$CLIP_NORM" \
    --lr "$LEARNING_RATE" --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --max-update "$UPDATES" \
    --warmup-updates "$WARMUP_UPDATES" --max-tokens "$MAX_TOKENS" --seed "$SEED" --num-workers 0 "${EVERY_SENTENCE[@]}" \
    --save-dir "$RUN_FOLDER" --save-interval-updates "$SAVE_INTERVAL" --keep-interval-updates "$AVERAGE" \
    --no-epoch-checkpoints --validate-interval 1000000 "${LOG_FORMAT[@]}" --log-interval 100 "${DEVICE_FLAGS[@]}" "$@"
}

require_choice MODEL moe dense
check_settings
require_multiple
require_flags "$@"
use_environment
export WORK RUN DEVICE THREADS
set_device
set_model_flags
bash "$HERE/prepare.sh"
RUN_FOLDER=$WORK/$RUN
# UPDATES is not included, so that a finished run can be extended; its learning rate then jumps up to that of the longer run.
settings=$(printf '%s\n' "text $(<"$WORK/prepared")" "${MODEL_FLAGS[*]}" \
  "$SAMPLES $CLIP_NORM $LEARNING_RATE $WARMUP_UPDATES $MAX_TOKENS $SEED" "$*")
keep_settings "$RUN_FOLDER" "$settings"
say "training $MODEL, $UPDATES updates; log: $RUN_FOLDER/train.log"
train_model "$@"
grep -o 'done training in .*' "$RUN_FOLDER/train.log" | tail -n 1 || true
nmt-moe average --inputs "$RUN_FOLDER" --last "$AVERAGE" --output "$RUN_FOLDER/average.pt" --overwrite
[[ $EVALUATE == 0 ]] || bash "$HERE/evaluate.sh"
