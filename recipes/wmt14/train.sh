#!/usr/bin/env bash
# Train the paper's model for WMT14: train.sh [--dry-run] [FLAG-OF-FAIRSEQ-TRAIN...]
#
# This script prepares the text (prepare.sh and its variables), then trains or resumes RUN from its last checkpoint.
# --dry-run prints the size of the batch and the command. To save memory or time, add fairseq's flags, such as --bf16.
#   MODEL       moe32 (default: 32 experts, flat, 4 per token), moe512, moe2048 (hierarchical, 2 at each level), or dense
#   GPUS        processes, one for each GPU (1); 8 on a machine with 8 GPUs. For SLURM, see recipes/wmt14/slurm.sbatch
#   MAX_TOKENS  tokens that a GPU processes at a time (16000); with less memory, a fraction of that, such as 4000
#   UPDATES     updates to train (en-de 12000, en-fr 37000)
#   LEARNING_RATE  rate after the warm-up (0.001)
#   OPTIMIZER   adam (default), or factored_adam, which keeps a row and a column for each expert matrix (Appendix D)
#   SAVE_INTERVAL  updates between two checkpoints; valid is scored at each (500)
#   RUN         name of the run, a folder in WORK (MODEL-seedSEED);  SEED (1)
#   DEVICE      auto (default), cpu or cuda;  WORK as in prepare.sh
#   LAUNCH      torchrun (default with GPUS above 1), plain, or srun (default inside a SLURM job; GPUS are its tasks)
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
manual_if_asked "${2:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$REPOSITORY/recipes/wmt14/settings.sh"
take_dry_run "${@:2}"

# The paper's batch consists of 64 GPUs x 16,000 words. With fewer GPUs or words, the gradients of several passes are accumulated.
PAPER_GPUS=64
WORDS_PER_GPU=16000
MAX_TOKENS=${MAX_TOKENS:-16000}
GPUS=${GPUS:-${SLURM_NTASKS:-1}}
if [[ -n ${SLURM_NTASKS:-} ]]; then LAUNCH=${LAUNCH:-srun}; fi
require_whole GPUS 1
LAUNCH=${LAUNCH:-$( ((GPUS > 1)) && printf torchrun || printf plain)}

# The paper states 2000 updates of linear warm-up and 8000 at the full rate, but neither the rate nor the number of
# updates. Training took 1 day for en-de and 3 days for en-fr, on 64 K40 GPUs. With 3 x 2 x 85M operations per token, 16,000
# tokens and about 1.2e12 operations per second, an update takes 7 s, which gives 12,000 updates per day.
WARMUP_UPDATES=${WARMUP_UPDATES:-2000}
HOLD_UPDATES=${HOLD_UPDATES:-8000}
if [[ $PAIR == fr ]]; then UPDATES=${UPDATES:-37000}; fi
UPDATES=${UPDATES:-12000}
LEARNING_RATE=${LEARNING_RATE:-0.001}
OPTIMIZER=${OPTIMIZER:-adam}
# Dropout is applied to the output of every embedding, LSTM and MoE layer.
DROPOUT=${DROPOUT:-0.4}
# GNMT uses this value.
CLIP_NORM=${CLIP_NORM:-5.0}
SAVE_INTERVAL=${SAVE_INTERVAL:-500}
MODEL=${MODEL:-moe32}
SEED=${SEED:-1}
RUN=${RUN:-$MODEL-seed$SEED}
RUN_FOLDER=$WORK/$RUN

set_model_flags() {
  case $MODEL in
    moe32) MODEL_FLAGS=(--arch lstm_moe_gnmt --num-experts 32 --moe-top-k 4) ;;
    moe512) MODEL_FLAGS=(--arch lstm_moe_gnmt_512h) ;;
    moe2048) MODEL_FLAGS=(--arch lstm_moe_gnmt_2048h) ;;
    dense) MODEL_FLAGS=(--arch lstm_gnmt) ;;
  esac
  [[ $MODEL == dense ]] || MODEL_FLAGS+=(--moe-gate strictly_balanced)
  MODEL_FLAGS+=(--dropout "$DROPOUT")
}

set_update_freq() { # the number of passes that add up to the paper's batch
  local words=$((PAPER_GPUS * WORDS_PER_GPU)) at_once=$((GPUS * MAX_TOKENS))
  ((words % at_once == 0)) ||
    die "$PAPER_GPUS x $WORDS_PER_GPU = $words words per update must be a multiple of GPUS x MAX_TOKENS =" \
      "$GPUS x $MAX_TOKENS = $at_once words; choose GPUS and MAX_TOKENS so that their product divides $words, such as 8 and 4000"
  UPDATE_FREQ=$((words / at_once))
  say "$words words per update (the paper's $PAPER_GPUS GPUs x $WORDS_PER_GPU) =" \
    "GPUS x MAX_TOKENS x accumulated passes = $GPUS x $MAX_TOKENS x $UPDATE_FREQ"
}

set_launcher() {
  PARALLEL_FLAGS=()
  case $LAUNCH in
    plain)
      ((GPUS == 1)) || die "LAUNCH=plain starts one process, but GPUS is $GPUS; leave LAUNCH out"
      LAUNCHER=(fairseq-train)
      ;;
    torchrun) LAUNCHER=(torchrun --nproc-per-node "$GPUS" -m fairseq_cli.train) ;;
    srun)
      LAUNCHER=(srun fairseq-train)
      # fairseq takes ranks and host from the SLURM job.
      PARALLEL_FLAGS=(--distributed-world-size "$GPUS" --distributed-port "${PORT:-29500}")
      ;;
  esac
  ((GPUS == 1)) || PARALLEL_FLAGS+=(--ddp-backend legacy_ddp)
}

set_command() {
  COMMAND=("${LAUNCHER[@]}" "$WORK/data-bin" --user-dir "$REPOSITORY/nmt_moe" "${MODEL_FLAGS[@]}"
    --criterion moe_label_smoothed_cross_entropy --label-smoothing 0
    --optimizer "$OPTIMIZER" --clip-norm "$CLIP_NORM" --lr "$LEARNING_RATE"
    --lr-scheduler warmup_hold_inverse_sqrt --warmup-updates "$WARMUP_UPDATES" --hold-updates "$HOLD_UPDATES"
    --max-tokens "$MAX_TOKENS" --update-freq "$UPDATE_FREQ" --max-update "$UPDATES" --seed "$SEED"
    "${EVERY_SENTENCE[@]}" --save-dir "$RUN_FOLDER" --save-interval-updates "$SAVE_INTERVAL"
    --best-checkpoint-metric nll_loss
    --keep-interval-updates 1 --no-epoch-checkpoints "${LOG_FORMAT[@]}" --log-interval 50
    --tensorboard-logdir "$RUN_FOLDER/tensorboard" "${DEVICE_FLAGS[@]}" "${PARALLEL_FLAGS[@]}" "${FLAGS[@]}")
}

refuse_another_run() { # a run cannot be resumed with a different network, batch or text
  local settings
  # UPDATES is not included, so that a finished run can be extended; GPUS and MAX_TOKENS do not change the batch.
  settings=$(printf '%s\n' "text $(<"$WORK/prepared")" "${MODEL_FLAGS[*]}" "$OPTIMIZER $CLIP_NORM $SEED" \
    "$LEARNING_RATE $WARMUP_UPDATES $HOLD_UPDATES" "${FLAGS[*]}")
  keep_settings "$RUN_FOLDER" "$settings"
}

require_choice MODEL moe32 moe512 moe2048 dense
require_choice OPTIMIZER adam factored_adam
require_choice LAUNCH plain torchrun srun
check_settings
set_model_flags
set_update_freq
set_launcher
if [[ $DRY_RUN == 1 ]]; then
  DEVICE_FLAGS=()
  [[ $DEVICE != cpu ]] || DEVICE_FLAGS=(--cpu)
  set_command
  show_command "${COMMAND[@]}"
  exit
fi
use_environment_unless_dry
set_device
bash "$HERE/prepare.sh" "$PAIR"
set_command
refuse_another_run
say "training $MODEL, en-$PAIR, $UPDATES updates; log: $RUN_FOLDER/train.log"
train_logged "$RUN_FOLDER/train.log" "${COMMAND[@]}"
say "done: score it with MODEL=$MODEL RUN=$RUN bash recipes/wmt14_en_$PAIR/evaluate.sh"
