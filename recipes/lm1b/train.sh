#!/usr/bin/env bash
# Train on the One Billion Word benchmark and score the result: train.sh [FLAG-OF-FAIRSEQ-TRAIN...]
#
# This script prepares the text (prepare.sh and its variables), trains or resumes the run from its last checkpoint, and calls
# evaluate.sh. To use several machines, run prepare.sh on one of them; then run this script on all of them, with a different
# NODE_RANK on each machine and a shared WORK.
#   SLICE      1 trains a model with all widths divided by 8 on a part of the text, in minutes on a laptop (0)
#   MODEL      architecture (lstm_moe_lm_4096h; with SLICE lstm_moe_lm_32): any row in Table 7, see the README
#   RUN        name of the run, a folder in WORK (MODEL-seedSEED); use a different name for different settings
#   GPUS       processes on each machine (the GPUs that torch finds, or 1 process)
#   NODES, NODE_RANK, MASTER   number of machines (1), index of this machine (0), host name of machine 0 (localhost)
#   SEED       seed of parameters, the order of the text, dropout and the gates' noise (1)
#   DEVICE     auto (default: a GPU if there is one), cpu or cuda
#   EVALUATE=0 stops after training
# All other variables are explained below.
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/lm1b
manual_if_asked "${1:-}"

SLICE=${SLICE:-0}
require_choice SLICE 0 1
DIVIDE=1 START=()
if [[ $SLICE == 1 ]]; then
  WORK=${WORK:-$HERE/work/slice}
  MODEL=${MODEL:-lstm_moe_lm_32}
  # All widths in Table 7 are divided by 8; narrow layers need larger initial weights.
  DIVIDE=8 START=(--init-range 0.1)
  BATCH_WORDS=${BATCH_WORDS:-2000} MAX_TOKENS=${MAX_TOKENS:-2000} SAMPLES=${SAMPLES:-1000}
  EPOCHS=${EPOCHS:-2} WARMUP_UPDATES=${WARMUP_UPDATES:-100} LEARNING_RATE=${LEARNING_RATE:-0.01}
fi
WORK=${WORK:-$HERE/work/full}
MODEL=${MODEL:-lstm_moe_lm_4096h}
SEED=${SEED:-1}
RUN=${RUN:-$MODEL-seed$SEED}
DEVICE=${DEVICE:-auto}
NODES=${NODES:-1}
NODE_RANK=${NODE_RANK:-0}
MASTER=${MASTER:-localhost}
EVALUATE=${EVALUATE:-1}
# The paper's batch has about 300,000 words per update. Batches are accumulated up to that number:
# 4,688 words x 32 GPUs x 2 = 300,032; x 8 GPUs x 8 = 300,032. Batches contain little padding, because sentences of
# similar length are batched together.
BATCH_WORDS=${BATCH_WORDS:-300000}
MAX_TOKENS=${MAX_TOKENS:-4688}
# Table 7 gives results after 10 passes. A pass has 768,648,884 words + 30,301,028 end marks = 798,949,912 tokens. Divided by
# 300,032, this is 2,663 updates, or 26,629 in all. Because batches contain padding, there are slightly more.
EPOCHS=${EPOCHS:-10}
# In the paper's schedule, the rate rises linearly for 1,000 updates and then falls as 1/sqrt(update). The paper does not state
# the peak, so this recipe chooses it.
WARMUP_UPDATES=${WARMUP_UPDATES:-1000}
LEARNING_RATE=${LEARNING_RATE:-0.001}
# 8,192 samples from the vocabulary, as in Jozefowicz et al. 2016, replace the softmax over 793,471 words. 0 means the full
# softmax.
SAMPLES=${SAMPLES:-8192}
# Validation computes all logits: 512 words x 793,471 x 4 bytes = 1.6 GB, several times over.
VALID_TOKENS=${VALID_TOKENS:-512}
SAVE_INTERVAL=${SAVE_INTERVAL:-1000}

set_launcher() { # set how to run fairseq-train, and how many batches to accumulate
  local per_update
  if [[ -z ${GPUS:-} && $DEVICE == cpu ]]; then GPUS=1; fi
  GPUS=${GPUS:-$(python -c 'import torch; print(max(1, torch.cuda.device_count()))')}
  require_whole GPUS 1
  per_update=$((MAX_TOKENS * GPUS * NODES))
  UPDATE_FREQ=$(((BATCH_WORDS + per_update - 1) / per_update))
  # Without the world size, fairseq would use every GPU that it sees.
  LAUNCHER=(fairseq-train) PROCESSES=(--distributed-world-size 1)
  if ((GPUS * NODES > 1)); then
    LAUNCHER=(torchrun --nnodes "$NODES" --node-rank "$NODE_RANK" --nproc-per-node "$GPUS" --master-addr "$MASTER"
      --master-port "${MASTER_PORT:-29500}" -m fairseq_cli.train)
    PROCESSES=(--ddp-backend legacy_ddp)
  fi
  say "$((per_update * UPDATE_FREQ)) words per update = MAX_TOKENS x GPUS x NODES x accumulated batches =" \
    "$MAX_TOKENS x $GPUS x $NODES x $UPDATE_FREQ"
}

set_sizes() { # set the widths of MODEL, which must be an architecture of this project
  local widths
  widths=$(python "$HERE/sizes.py" "$MODEL" --divide "$DIVIDE")
  read -ra SIZES <<<"$widths"
  SIZES+=("${START[@]}")
}

train_model() { # resumes automatically: fairseq looks for checkpoint_last.pt
  train_logged "$RUN_FOLDER/train.log" "${LAUNCHER[@]}" "$WORK/data-bin" --user-dir "$REPOSITORY/nmt_moe" \
    --task language_modeling --sample-break-mode eos --arch "$MODEL" "${SIZES[@]}" "${PROCESSES[@]}" \
    --criterion moe_cross_entropy --sampled-softmax "$SAMPLES" --optimizer factored_adam \
    --lr "$LEARNING_RATE" --lr-scheduler warmup_hold_inverse_sqrt --warmup-updates "$WARMUP_UPDATES" --hold-updates 0 \
    --max-tokens "$MAX_TOKENS" --update-freq "$UPDATE_FREQ" --max-tokens-valid "$VALID_TOKENS" --max-epoch "$EPOCHS" \
    --seed "$SEED" --num-workers 0 "${EVERY_SENTENCE[@]}" --save-dir "$RUN_FOLDER" \
    --save-interval-updates "$SAVE_INTERVAL" --keep-interval-updates 1 --no-epoch-checkpoints \
    --validate-interval-updates "$SAVE_INTERVAL" "${LOG_FORMAT[@]}" --log-interval 20 "${DEVICE_FLAGS[@]}" "$@"
}

check_settings
require_flags "$@"
use_environment
export SLICE WORK RUN DEVICE
set_device
set_sizes
set_launcher
[[ $NODE_RANK != 0 ]] || bash "$HERE/prepare.sh"
RUN_FOLDER=$WORK/$RUN
settings="text $(<"$WORK/prepared"), $MODEL ${SIZES[*]}, $BATCH_WORDS $WARMUP_UPDATES $LEARNING_RATE $SAMPLES $SEED, $*"
keep_settings "$RUN_FOLDER" "$settings"
say "training $MODEL, $EPOCHS passes; log: $RUN_FOLDER/train.log"
train_model "$@"
[[ $EVALUATE == 0 || $NODE_RANK != 0 ]] || bash "$HERE/evaluate.sh"
