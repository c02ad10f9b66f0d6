#!/usr/bin/env bash
# Generate a text, train a model on it and score the model: run.sh [FLAG...] [-- FLAG-OF-FAIRSEQ-TRAIN...]
#
# This script generates a corpus of numbers, dates, times and prices written out in English and another language, trains a
# small GNMT + MoE model on it, translates sentences that the model has never seen, and prints BLEU, chrF and ten translations.
# If you run the script again, it continues where it stopped; changing a setting repeats the steps that depend on it.
#   --target-lang LANG   fr or de                                                TARGET_LANG (fr)
#   --train-size N       number of pairs to train on                             TRAIN_SIZE (12000)
#   --test-size N        number of pairs to translate                            TEST_SIZE (500)
#   --updates N          number of updates                                       UPDATES (1200)
#   --device DEVICE      auto, cpu or cuda; auto uses a GPU if there is one      DEVICE (auto)
#   --seed N             seed of corpus and model                                SEED (1)
#   --work FOLDER        folder for all output                                   WORK (recipes/demo/work)
# The variables on the right have the same effect. Other variables: VOCAB_SIZE (at most 700 pieces), MAX_TOKENS (1000 pieces per
# update, counted on the longer side), LEARNING_RATE (0.003), MODEL_DIM (96), LSTM_HIDDEN_DIM (96), NUM_EXPERTS (8), TOP_K (2),
# EXPERT_HIDDEN_DIM (128), INIT_RANGE (0.3), DROPOUT (0), BEAM (5), AVERAGE (the last 3 checkpoints), SAVE_INTERVAL
# (updates between two checkpoints; a fifteenth of UPDATES).
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/demo

TARGET_LANG=${TARGET_LANG:-fr}
TRAIN_SIZE=${TRAIN_SIZE:-12000}
TEST_SIZE=${TEST_SIZE:-500}
UPDATES=${UPDATES:-1200}
DEVICE=${DEVICE:-auto}
SEED=${SEED:-1}
WORK=${WORK:-$HERE/work}
VOCAB_SIZE=${VOCAB_SIZE:-700}
MAX_TOKENS=${MAX_TOKENS:-1000}
LEARNING_RATE=${LEARNING_RATE:-0.003}
MODEL_DIM=${MODEL_DIM:-96}
LSTM_HIDDEN_DIM=${LSTM_HIDDEN_DIM:-96}
NUM_EXPERTS=${NUM_EXPERTS:-8}
TOP_K=${TOP_K:-2}
EXPERT_HIDDEN_DIM=${EXPERT_HIDDEN_DIM:-128}
# In this narrow model, attention forms in a third of the updates that it would need with a range of 0.15.
INIT_RANGE=${INIT_RANGE:-0.3}
DROPOUT=${DROPOUT:-0}
BEAM=${BEAM:-5}
AVERAGE=${AVERAGE:-3}

while (($#)); do
  case $1 in
    -h | --help) manual_if_asked "$1" ;;
    --)
      shift
      break
      ;;
    --target-lang | --train-size | --test-size | --updates | --device | --seed | --work)
      (($# > 1)) || die "$1 needs a value"
      name=${1#--}
      name=${name//-/_}
      printf -v "${name^^}" '%s' "$2"
      shift 2
      ;;
    *) die "unknown argument '$1'; see run.sh --help, and put fairseq-train's own flags after --" ;;
  esac
done
TRAIN_FLAGS=("$@")

require_choice TARGET_LANG fr de
require_whole UPDATES 1
SAVE_INTERVAL=${SAVE_INTERVAL:-$(((10#$UPDATES + 14) / 15))}
check_settings

make_corpus() {
  python "$HERE/make_corpus.py" "$WORK/corpus" --target-lang "$TARGET_LANG" --seed "$SEED" \
    --train-size "$TRAIN_SIZE" --valid-size 300 --test-size "$TEST_SIZE"
  paste -d '\n' "$WORK/corpus"/test.{en,"$TARGET_LANG"} | sed -n 1,4p
}

cut_into_pieces() {
  local split
  nmt-moe pieces train --model-type bpe --vocab-size "$VOCAB_SIZE" --no-hard-vocab-limit --model "$WORK/spm.model" \
    --dictionary "$WORK/dict.txt" --inputs "$WORK/corpus"/train.{en,"$TARGET_LANG"}
  mkdir -p "$WORK/pieces"
  for split in train valid test; do
    nmt-moe pieces encode --model "$WORK/spm.model" --inputs "$WORK/corpus/$split".{en,"$TARGET_LANG"} \
      --outputs "$WORK/pieces/$split".{en,"$TARGET_LANG"}
  done
}

binarise() {
  rm -rf "$WORK/data-bin"
  logged "$WORK/preprocess.log" fairseq-preprocess --source-lang en --target-lang "$TARGET_LANG" --srcdict "$WORK/dict.txt" \
    --tgtdict "$WORK/dict.txt" --trainpref "$WORK/pieces/train" --validpref "$WORK/pieces/valid" \
    --testpref "$WORK/pieces/test" --destdir "$WORK/data-bin"
}

train() { # KEY
  keep_or_clear "$WORK/training" "$1"
  # The rate rises for a tenth of training, stays constant for four tenths, and then falls as 1/sqrt(update).
  train_logged "$WORK/training/train.log" fairseq-train "$WORK/data-bin" --user-dir "$REPOSITORY/nmt_moe" \
    --arch lstm_moe_gnmt_small --model-dim "$MODEL_DIM" --lstm-hidden-dim "$LSTM_HIDDEN_DIM" \
    --num-experts "$NUM_EXPERTS" --moe-top-k "$TOP_K" --expert-hidden-dim "$EXPERT_HIDDEN_DIM" --dropout "$DROPOUT" \
    --init-range "$INIT_RANGE" --attention-wiring parallel \
    --criterion moe_label_smoothed_cross_entropy --label-smoothing 0.1 \
    --optimizer adam --adam-betas '(0.9, 0.98)' --clip-norm 5.0 --lr "$LEARNING_RATE" \
    --lr-scheduler warmup_hold_inverse_sqrt --warmup-updates $((UPDATES / 10)) --hold-updates $((UPDATES * 4 / 10)) \
    --max-tokens "$MAX_TOKENS" --max-update "$UPDATES" --seed "$SEED" --num-workers 0 "${EVERY_SENTENCE[@]}" \
    --save-dir "$WORK/training" --no-epoch-checkpoints --save-interval-updates "$SAVE_INTERVAL" \
    --keep-interval-updates "$AVERAGE" "${LOG_FORMAT[@]}" --log-interval 50 \
    --tensorboard-logdir "$WORK/training/tensorboard" "${DEVICE_FLAGS[@]}" "${TRAIN_FLAGS[@]}"
}

average() {
  nmt-moe average --inputs "$WORK/training" --last "$AVERAGE" --output "$WORK/average.pt" --overwrite
}

translate() {
  local output=$WORK/translation.$TARGET_LANG
  translate_logged "$output" "$WORK/data-bin" --path "$WORK/average.pt" --gen-subset test --beam "$BEAM" \
    --batch-size 128 --remove-bpe sentencepiece
  nmt-moe check-parallel --allow-empty "$WORK/corpus/test.$TARGET_LANG" "$output"
}

score() {
  quietly sacrebleu "$WORK/corpus/test.$TARGET_LANG" -i "$WORK/translation.$TARGET_LANG" --metrics bleu chrf --format text \
    >"$WORK/score.txt"
}

export_translator() {
  export_bundle "$WORK/average.pt" "$WORK/bundle" --data "$WORK/data-bin" --pieces "$WORK/spm.model" --beam "$BEAM" \
    --scores "$WORK/score.txt"
}

show_translations() {
  printf '\nTen of the %s test sentences, none of them in the training text:\n' "$TEST_SIZE"
  paste -d '\n' "$WORK/corpus/test.en" "$WORK/translation.$TARGET_LANG" | sed -n 1,20p |
    awk 'NR % 2 { print "\n  " $0; next } { print "  -> " $0 }'
}

use_environment
set_device
after_setup=$SECONDS
say "en-$TARGET_LANG in $WORK; training log: $WORK/training/train.log"
key=$(step_key "" corpus "$TARGET_LANG $TRAIN_SIZE $TEST_SIZE $SEED $(digest <"$HERE/make_corpus.py")")
run_step "$WORK" corpus "$key" make_corpus
key=$(step_key "$key" pieces "$VOCAB_SIZE")
run_step "$WORK" pieces "$key" cut_into_pieces
key=$(step_key "$key" binarise "")
run_step "$WORK" binarise "$key" binarise
key=$(step_key "$key" train "$UPDATES $MAX_TOKENS $LEARNING_RATE $MODEL_DIM $LSTM_HIDDEN_DIM $NUM_EXPERTS $TOP_K $EXPERT_HIDDEN_DIM
  $INIT_RANGE $DROPOUT $SAVE_INTERVAL $AVERAGE $DEVICE ${TRAIN_FLAGS[*]}")
run_step "$WORK" train "$key" train "$key"
key=$(step_key "$key" average "")
run_step "$WORK" average "$key" average
key=$(step_key "$key" translate "$BEAM")
run_step "$WORK" translate "$key" translate
key=$(step_key "$key" score "")
run_step "$WORK" score "$key" score
key=$(step_key "$key" export "")
run_step "$WORK" export "$key" export_translator
show_translations
printf '\n'
cat "$WORK/score.txt"
text='the train leaves at half past six in the evening'
printf '\nThe trained model is a folder. Translate your own text with it, in this repository after source .venv/bin/activate or\n'
printf "anywhere after pip install . (without fairseq or a compiler):\n\n    echo '%s' | nmt-moe translate %q\n    %s\n" "$text" "$WORK/bundle" \
  "$(nmt-moe translate "$WORK/bundle" <<<"$text")"
printf '\nTraining log: %s   curves: tensorboard --logdir %s\n' "$WORK/training/train.log" "$WORK/training/tensorboard"
say "done in $((SECONDS - after_setup)) s after set-up"
