#!/usr/bin/env bash
# Translate newstest2014 with a trained model and score it: evaluate.sh [--dry-run] [FLAG-OF-FAIRSEQ-GENERATE...]
#
# The script prints the scores of nmt-moe score, each with its signature; the score that the paper uses (tokenised, cased
# multi-bleu) comes first.
#   RUN         the run of train.sh (MODEL-seedSEED)
#   CHECKPOINT  the model, or several separated by colons for an ensemble (RUN's checkpoint_best.pt)
#   SUBSET      test (default: newstest2014) or valid (newstest2012 and newstest2013)
#   BEAM        beam size (8; GNMT: 8 to 12)
#   BATCH_SIZE  sentences per batch (64)
#   LENGTH_PENALTY_ALPHA, COVERAGE_PENALTY_BETA, BEAM_PRUNE
#               GNMT's search (0.2, 0.2, 3.0 as in the paper); if all are empty, fairseq's own search is used
#   AGAINST     another translation of the same subset, for a paired bootstrap
#   DEVICE, WORK as in train.sh
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
manual_if_asked "${2:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$REPOSITORY/recipes/wmt14/settings.sh"
take_dry_run "${@:2}"

# Empty variables are not passed on.
LENGTH_PENALTY_ALPHA=${LENGTH_PENALTY_ALPHA-0.2}
COVERAGE_PENALTY_BETA=${COVERAGE_PENALTY_BETA-0.2}
BEAM_PRUNE=${BEAM_PRUNE-3.0}
RUN=${RUN:-${MODEL:-moe32}-seed${SEED:-1}}
CHECKPOINTS=${CHECKPOINT:-$WORK/$RUN/checkpoint_best.pt}
SUBSET=${SUBSET:-test}
BEAM=${BEAM:-8}
BATCH_SIZE=${BATCH_SIZE:-64}
OUTPUT_FOLDER=$WORK/$RUN/translations
# Names end with the target language, because nmt-moe score chooses the tokeniser by it.
OUTPUT=$OUTPUT_FOLDER/$SUBSET.$PAIR
REFERENCE=$WORK/text/$SUBSET.reference

set_command() {
  local name flag
  COMMAND=(fairseq-generate "$WORK/data-bin" --user-dir "$REPOSITORY/nmt_moe" --path "$CHECKPOINTS"
    --gen-subset "$SUBSET" --beam "$BEAM" --batch-size "$BATCH_SIZE" --remove-bpe sentencepiece --num-workers 0
    "${EVERY_SENTENCE[@]}" "${DEVICE_FLAGS[@]}")
  for name in LENGTH_PENALTY_ALPHA COVERAGE_PENALTY_BETA BEAM_PRUNE; do
    flag=${name,,}
    [[ -z ${!name} ]] || COMMAND+=("--${flag//_/-}" "${!name}")
  done
  COMMAND+=("${FLAGS[@]}")
}

export_translator() { # for nmt-moe translate; not an ensemble
  local name flag flags=()
  [[ ${NORMALIZE:-source} == none ]] || flags=(--normalize-punctuation)
  for name in LENGTH_PENALTY_ALPHA COVERAGE_PENALTY_BETA BEAM_PRUNE; do
    flag=${name,,}
    [[ -z ${!name} ]] || flags+=("--${flag//_/-}" "${!name}")
  done
  export_bundle "$CHECKPOINTS" "$WORK/$RUN/bundle" --data "$WORK/data-bin" --pieces "$WORK/spm.model" --beam "$BEAM" \
    --scores "$OUTPUT.scores.txt" "${flags[@]}"
}

check_files() {
  local file
  for file in ${CHECKPOINTS//:/ }; do
    [[ -f $file ]] || die "$file is missing: train it with 'RUN=$RUN bash recipes/wmt14_en_$PAIR/train.sh', or set RUN" \
      "or CHECKPOINT"
  done
  for file in "$REFERENCE.en" "$REFERENCE.$PAIR" "$WORK/data-bin"; do
    [[ -e $file ]] || die "$file is missing: run 'bash recipes/wmt14_en_$PAIR/prepare.sh', or set WORK"
  done
  [[ -z ${AGAINST:-} || -f $AGAINST ]] || die "AGAINST=$AGAINST: the file is missing"
}

require_choice SUBSET test valid
check_settings
for name in LENGTH_PENALTY_ALPHA COVERAGE_PENALTY_BETA BEAM_PRUNE; do
  [[ -z ${!name} || ${!name} =~ ^[0-9]+(\.[0-9]+)?$ ]] || die "$name must be a number or empty, but is '${!name}'"
done
if [[ $DRY_RUN == 1 ]]; then
  DEVICE_FLAGS=()
  [[ $DEVICE != cpu ]] || DEVICE_FLAGS=(--cpu)
  set_command
  show_command "${COMMAND[@]}"
  show_command nmt-moe score "$OUTPUT" "$REFERENCE.$PAIR" --src "$REFERENCE.en"
  exit
fi
check_files
use_environment_unless_dry
set_device
set_command
mkdir -p "$OUTPUT_FOLDER"
say "translating $SUBSET with $CHECKPOINTS, beam $BEAM; log: $OUTPUT.log"
logged "$OUTPUT.log" "${COMMAND[@]}"
nmt-moe hypotheses "$OUTPUT.log" >"$OUTPUT"
nmt-moe score "$OUTPUT" "$REFERENCE.$PAIR" --src "$REFERENCE.en" \
  ${AGAINST:+--against "$AGAINST"} | tee "$OUTPUT.scores.txt"
say "translation and scores: $OUTPUT, $OUTPUT.scores.txt"
[[ $CHECKPOINTS == *:* || $SUBSET == valid ]] || export_translator
