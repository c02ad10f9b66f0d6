#!/usr/bin/env bash
# Train one model for all directions, or for one: train.sh [FLAG-OF-FAIRSEQ-TRAIN...]
#
# This script prepares the text (prepare.sh and its variables), trains or resumes the run from its last checkpoint, averages
# checkpoints and calls evaluate.sh.
#   MODEL   moe (default): one model for all directions; dense: the same number of operations per token, with one wide network in
#           place of each MoE layer; deep: the same number of operations, with more LSTMs instead; single: dense, for DIRECTION
#           alone
#   DIRECTION  for single, such as en-fr
#   TEMPERATURE, OVERSAMPLING  settings that make training use small pairs more often (1; none): see
#           --sampling-temperature and --oversampling of fairseq-train --task translation_multilingual_gnmt
#   RUN     name of the run, a folder in WORK (MODEL or single-DIRECTION, with -seedSEED); use another for different settings
#   SEED    seed of the parameters, the order of the text, dropout and the gates' noise (1)
#   DEVICE  auto (default: a GPU if there is one), cpu or cuda
#   THREADS threads of a training process on the CPU (2)
#   EVALUATE=0 stops after averaging
# The defaults suit tatoeba. multi30k has six times fewer pairs, so start there with fewer experts and with dropout, such as
# NUM_GROUPS=0 NUM_EXPERTS=16 TOP_K=4 DROPOUT=0.2 (not tried yet).
# All other variables are explained at the top of the file. MODEL_SIZE=paper selects the paper's model: 512 experts of hidden width
# 8192 in a network of width 512, which needs GPUs (nmt-moe card prints its memory).
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/multilingual
manual_if_asked "${1:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$HERE/settings.sh"

MODEL=${MODEL:-moe}
DIRECTION=${DIRECTION:-}
SEED=${SEED:-1}
DEVICE=${DEVICE:-auto}
THREADS=${THREADS:-2}
EVALUATE=${EVALUATE:-1}
TEMPERATURE=${TEMPERATURE:-1.0}
OVERSAMPLING=${OVERSAMPLING:-}
MODEL_SIZE=${MODEL_SIZE:-small}
# These are the sizes of the small network; the architecture sets the sizes of the paper's model.
MODEL_DIM=${MODEL_DIM:-64}
LSTM_HIDDEN_DIM=${LSTM_HIDDEN_DIM:-128}
# A token uses TOP_K of NUM_EXPERTS experts, or, with NUM_GROUPS, TOP_K experts in each of TOP_K groups.
NUM_EXPERTS=${NUM_EXPERTS:-256}
NUM_GROUPS=${NUM_GROUPS:-16}
TOP_K=${TOP_K:-2}
# Four experts of width 288 have as many weights as two LSTMs of 128 cells.
EXPERT_HIDDEN_DIM=${EXPERT_HIDDEN_DIM:-288}
INIT_RANGE=${INIT_RANGE:-0.1}
# Additive attention learns to align more reliably than "product" if there is little text (recipes/multi30k/result.md).
ATTENTION=${ATTENTION:-additive}
# The small network does not overfit in three passes over 508,837 pairs. The paper's single-pair models have a dropout of 0.4.
if [[ $MODEL_SIZE == paper ]]; then DROPOUT=${DROPOUT:-0.4}; else DROPOUT=${DROPOUT:-0.0}; fi
LABEL_SMOOTHING=${LABEL_SMOOTHING:-0.1}
CLIP_NORM=${CLIP_NORM:-5.0}
# 4000 pieces on the longer side x UPDATE_FREQ accumulated batches are about 290 sentences of tatoeba per update.
MAX_TOKENS=${MAX_TOKENS:-4000}
UPDATE_FREQ=${UPDATE_FREQ:-1}
# The rate rises and then falls linearly to 0 at the last update, as in recipes/multi30k.
UPDATES=${UPDATES:-11000}
WARMUP_UPDATES=${WARMUP_UPDATES:-500}
LEARNING_RATE=${LEARNING_RATE:-0.005}
# Every SAVE_INTERVAL updates, a checkpoint is saved and every direction is scored on valid; the last AVERAGE checkpoints are
# averaged.
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}
AVERAGE=${AVERAGE:-1}

set_model_flags() {
  local suffix=_small active=$TOP_K lstms
  ((NUM_GROUPS == 0)) || active=$((TOP_K * TOP_K))
  local experts=(--num-experts "$NUM_EXPERTS" --num-groups "$NUM_GROUPS" --top-k "$TOP_K" --expert-hidden-dim "$EXPERT_HIDDEN_DIM")
  MODEL_FLAGS=(--dropout "$DROPOUT")
  if [[ $MODEL_SIZE == paper ]]; then
    [[ $MODEL != deep ]] || die "MODEL=deep needs MODEL_SIZE=small"
    suffix=
    experts=()
  else
    # The target embeddings are shared with the softmax, so there are fewer weights to learn from little text.
    MODEL_FLAGS=(--share-decoder-input-output-embed "${MODEL_FLAGS[@]}" --model-dim "$MODEL_DIM"
      --lstm-hidden-dim "$LSTM_HIDDEN_DIM" --init-range "$INIT_RANGE" --attention "$ATTENTION")
    [[ $MODEL == moe ]] || experts=(--expert-hidden-dim $((active * EXPERT_HIDDEN_DIM)))
  fi
  if [[ $MODEL == deep ]]; then
    # An LSTM has 9 x MODEL_DIM x LSTM_HIDDEN_DIM weights; an expert has 2 x MODEL_DIM x EXPERT_HIDDEN_DIM.
    lstms=$((2 * active * EXPERT_HIDDEN_DIM / (9 * LSTM_HIDDEN_DIM)))
    ((lstms > 0 && 2 * active * EXPERT_HIDDEN_DIM == 9 * LSTM_HIDDEN_DIM * lstms)) ||
      die "with MODEL=deep, 2 x $active x EXPERT_HIDDEN_DIM must be a multiple of 9 x LSTM_HIDDEN_DIM, so that LSTMs can have as \
many operations as the experts of a token, but EXPERT_HIDDEN_DIM is $EXPERT_HIDDEN_DIM and LSTM_HIDDEN_DIM is $LSTM_HIDDEN_DIM"
    experts=(--dense --encoder-layers $((3 + lstms)) --decoder-layers $((2 + lstms)))
  fi
  if [[ $MODEL == moe ]]; then
    MODEL_FLAGS+=(--arch "lstm_moe_gnmt_multilingual$suffix" "${experts[@]}")
  else
    MODEL_FLAGS+=(--arch "lstm_gnmt_multilingual$suffix" "${experts[@]}")
  fi
}

train_model() { # resumes automatically: fairseq looks for checkpoint_last.pt
  OMP_NUM_THREADS=$THREADS train_logged "$RUN_FOLDER/train.log" \
    fairseq-train "$WORK_FOLDER/data-bin" --user-dir "$REPOSITORY/nmt_moe" "${TASK_FLAGS[@]}" "${PAIR_FLAGS[@]}" \
    "${MODEL_FLAGS[@]}" --criterion moe_label_smoothed_cross_entropy --label-smoothing "$LABEL_SMOOTHING" \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm "$CLIP_NORM" \
    --lr "$LEARNING_RATE" --lr-scheduler polynomial_decay --total-num-update "$UPDATES" --max-update "$UPDATES" \
    --warmup-updates "$WARMUP_UPDATES" --max-tokens "$MAX_TOKENS" --update-freq "$UPDATE_FREQ" --seed "$SEED" \
    --skip-invalid-size-inputs-valid-test --max-source-positions 250 --max-target-positions 250 \
    --num-workers 0 "${EVERY_SENTENCE[@]}" --save-dir "$RUN_FOLDER" --save-interval-updates "$SAVE_INTERVAL" \
    --keep-interval-updates "$AVERAGE" --no-epoch-checkpoints --validate-interval 1000000 \
    "${LOG_FORMAT[@]}" --log-interval 100 \
    --tensorboard-logdir "$RUN_FOLDER/tensorboard" "${DEVICE_FLAGS[@]}" "${FLAGS[@]}"
}

require_flags "$@"
FLAGS=("$@")
require_choice MODEL moe dense deep single
require_choice MODEL_SIZE small paper
check_settings
require_multiple
PAIR_FLAGS=(--lang-pairs "$LANG_PAIRS" --sampling-temperature "$TEMPERATURE" --oversampling "$OVERSAMPLING")
NAME=$MODEL
if [[ $MODEL == single ]]; then
  require_choice DIRECTION "${DIRECTIONS[@]}"
  PAIR_FLAGS=(--lang-pairs "$DIRECTION")
  NAME=single-$DIRECTION
elif [[ -n $DIRECTION ]]; then
  die "DIRECTION=$DIRECTION is for MODEL=single; MODEL=$MODEL trains all of ${DIRECTIONS[*]}"
fi
RUN=${RUN:-$NAME-seed$SEED}
use_environment
bash "$HERE/prepare.sh"
set_device
set_model_flags
RUN_FOLDER=$WORK_FOLDER/$RUN
# UPDATES is not included, so that a finished run can be extended.
settings=$(printf '%s\n' "text $(<"$WORK_FOLDER/prepared")" "${PAIR_FLAGS[*]}" "${MODEL_FLAGS[*]}" \
  "$LABEL_SMOOTHING $CLIP_NORM $LEARNING_RATE $WARMUP_UPDATES" "$MAX_TOKENS $UPDATE_FREQ $SEED" "${FLAGS[*]}")
keep_settings "$RUN_FOLDER" "$settings"
say "training $NAME, $UPDATES updates; log: $RUN_FOLDER/train.log"
train_model
awk 'shown && !/^  / { exit } sub(/.*sampling: /, "sampling: ") { shown = 1 } shown' "$RUN_FOLDER/train.log"
nmt-moe average --inputs "$RUN_FOLDER" --last "$AVERAGE" --output "$RUN_FOLDER/average.pt" --overwrite
[[ $EVALUATE == 0 ]] || MODEL=$MODEL DIRECTION=$DIRECTION RUN=$RUN bash "$HERE/evaluate.sh"
