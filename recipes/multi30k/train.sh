#!/usr/bin/env bash
# Train on Multi30k and score the result: train.sh [PAIR...] [FLAG-OF-FAIRSEQ-TRAIN...]
#
# PAIR: de or fr (from English); default: both, one after the other. The script prepares the text (prepare.sh and its
# variables), trains or resumes the run from its last checkpoint, averages checkpoints, and calls evaluate.sh.
#   MODEL   moe (default), or dense: a model without experts, with the same number of operations per token
#   RUN     name of the run, a folder in WORK (MODEL-seedSEED); use a different name for different settings
#   SEED    seed of the parameters, the order of the text, dropout and the gates' noise (1)
#   DEVICE  auto (default: a GPU if there is one), cpu or cuda
#   THREADS threads of a training process on the CPU (2)
#   EVALUATE=0 stops after averaging; AVERAGE_ONLY=1 starts with averaging
# All other variables are explained at the top of the file.
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/multi30k
manual_if_asked "${1:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$HERE/settings.sh"

# The network is small, so an hour on one core suffices for many passes over 29,000 captions.
MODEL_DIM=${MODEL_DIM:-128}
LSTM_HIDDEN_DIM=${LSTM_HIDDEN_DIM:-256}
ENCODER_LAYERS=${ENCODER_LAYERS:-3}
DECODER_LAYERS=${DECODER_LAYERS:-2}
INIT_RANGE=${INIT_RANGE:-0.1}
# Additive attention learns to align both pairs with the same settings; with "product", this depends on the pair, the rate and
# the warm-up (result.md).
ATTENTION=${ATTENTION:-additive}
WIRING=${WIRING:-parallel}
# With 1, the target embeddings are shared with the softmax, so there are fewer weights to learn from little text.
TIE_OUTPUT=${TIE_OUTPUT:-1}
# A token uses TOP_K of NUM_EXPERTS experts, each with 2 x 128 x 256 weights.
NUM_EXPERTS=${NUM_EXPERTS:-8}
TOP_K=${TOP_K:-2}
EXPERT_HIDDEN_DIM=${EXPERT_HIDDEN_DIM:-256}
IMPORTANCE_WEIGHT=${IMPORTANCE_WEIGHT:-0.01}
LOAD_WEIGHT=${LOAD_WEIGHT:-0.01}
# These reduce overfitting.
DROPOUT=${DROPOUT:-0.25}
LABEL_SMOOTHING=${LABEL_SMOOTHING:-0.1}
WEIGHT_DECAY=${WEIGHT_DECAY:-0.0}
# 1000 pieces (on the longer side) x 1 accumulated batch are about 54 sentences per update, so a pass over 29,000 sentences
# takes 540 updates.
MAX_TOKENS=${MAX_TOKENS:-1000}
UPDATE_FREQ=${UPDATE_FREQ:-1}
# 12,000 updates are 22 passes. The rate rises and then falls linearly to 0 at the last update. With so few updates, the
# paper's schedule (constant, then 1/sqrt) would end before the rate is low enough to converge. The rate rises slowly, because
# attention must form (by update 2,500) before the rate is high. With a warm-up of 200 or 500 updates, the product attention
# of En-Fr got stuck on one position (result.md).
UPDATES=${UPDATES:-12000}
WARMUP_UPDATES=${WARMUP_UPDATES:-2000}
LEARNING_RATE=${LEARNING_RATE:-0.004}
CLIP_NORM=${CLIP_NORM:-5.0}
# A checkpoint is saved every SAVE_INTERVAL updates. The last AVERAGE checkpoints are averaged or, with CHOOSE=best, the
# best ones on val.
SAVE_INTERVAL=${SAVE_INTERVAL:-200}
AVERAGE=${AVERAGE:-5}
CHOOSE=${CHOOSE:-last}

MODEL=${MODEL:-moe}
SEED=${SEED:-1}
RUN=${RUN:-$MODEL-seed$SEED}
DEVICE=${DEVICE:-auto}
THREADS=${THREADS:-2}
EVALUATE=${EVALUATE:-1}
AVERAGE_ONLY=${AVERAGE_ONLY:-0}

set_model_flags() {
  MODEL_FLAGS=(--model-dim "$MODEL_DIM" --lstm-hidden-dim "$LSTM_HIDDEN_DIM" --encoder-layers "$ENCODER_LAYERS"
    --decoder-layers "$DECODER_LAYERS" --attention "$ATTENTION" --attention-wiring "$WIRING" --init-range "$INIT_RANGE"
    --dropout "$DROPOUT")
  [[ $TIE_OUTPUT == 0 ]] || MODEL_FLAGS+=(--share-decoder-input-output-embed)
  if [[ $MODEL == moe ]]; then
    MODEL_FLAGS+=(--arch lstm_moe_gnmt_small --num-experts "$NUM_EXPERTS" --moe-top-k "$TOP_K"
      --expert-hidden-dim "$EXPERT_HIDDEN_DIM" --importance-loss-weight "$IMPORTANCE_WEIGHT"
      --load-loss-weight "$LOAD_WEIGHT")
  else
    # Each MoE layer is replaced by one network that costs as much as TOP_K experts.
    MODEL_FLAGS+=(--arch lstm_gnmt_small --expert-hidden-dim $((TOP_K * EXPERT_HIDDEN_DIM)))
  fi
}

# train_model DATA FOLDER: train, and resume automatically, because fairseq looks for checkpoint_last.pt.
train_model() {
  local keep=(--keep-interval-updates "$AVERAGE")
  [[ $CHOOSE == best ]] && keep=(--keep-interval-updates 1 --keep-best-checkpoints "$AVERAGE")
  OMP_NUM_THREADS=$THREADS train_logged "$2/train.log" \
    fairseq-train "$1" --user-dir "$REPOSITORY/nmt_moe" "${MODEL_FLAGS[@]}" \
    --criterion moe_label_smoothed_cross_entropy --label-smoothing "$LABEL_SMOOTHING" \
    --optimizer adam --adam-betas '(0.9, 0.98)' --weight-decay "$WEIGHT_DECAY" --clip-norm "$CLIP_NORM" \
    --lr "$LEARNING_RATE" --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --max-update "$UPDATES" \
    --warmup-updates "$WARMUP_UPDATES" --max-tokens "$MAX_TOKENS" --update-freq "$UPDATE_FREQ" --seed "$SEED" \
    --num-workers 0 "${EVERY_SENTENCE[@]}" --save-dir "$2" --save-interval-updates "$SAVE_INTERVAL" \
    "${keep[@]}" --no-epoch-checkpoints --validate-interval 1000000 \
    "${LOG_FORMAT[@]}" --log-interval 100 \
    --tensorboard-logdir "$2/tensorboard" "${DEVICE_FLAGS[@]}" "${FLAGS[@]}"
}

train_pair() {
  local pair=$1 settings work folder chosen=--last
  work=$(work_folder "$pair")
  folder=$work/$RUN
  bash "$HERE/prepare.sh" "$pair"
  # UPDATES is not included, so that a finished run can be extended; its learning rate then jumps to the higher rate of the longer run.
  settings=$(printf '%s\n' "text $(<"$work/prepared")" "${MODEL_FLAGS[*]}" \
    "$LABEL_SMOOTHING $WEIGHT_DECAY $CLIP_NORM" \
    "$LEARNING_RATE $WARMUP_UPDATES" "$MAX_TOKENS $UPDATE_FREQ $SEED" "${FLAGS[*]}")
  keep_settings "$folder" "$settings"
  say "training $MODEL, en-$pair, $UPDATES updates; log: $folder/train.log"
  [[ $AVERAGE_ONLY == 1 ]] || train_model "$work/data-bin" "$folder"
  grep -o 'done training in .*' "$folder/train.log" | tail -n 1 || true
  [[ $CHOOSE == last ]] || chosen=--num-best-checkpoints
  nmt-moe average --inputs "$folder" "$chosen" "$AVERAGE" --output "$folder/average.pt" --overwrite
  [[ $EVALUATE == 0 ]] || RUN=$RUN DEVICE=$DEVICE THREADS=$THREADS bash "$HERE/evaluate.sh" "$pair"
}

parse_pairs "$@"
require_choice MODEL moe dense
require_choice CHOOSE last best
check_settings
require_multiple
use_environment
export CASE
set_device
set_model_flags
# shellcheck disable=SC2153
for pair in "${PAIRS[@]}"; do train_pair "$pair"; done
