#!/usr/bin/env bash
# Score a trained model in every direction, and print the table of all models scored so far: evaluate.sh
#
#   MODEL, DIRECTION, RUN, SEED, DEVICE, THREADS, WORK, CORPUS, LANGUAGES as in train.sh
#   CHECKPOINT   the model (RUN's average.pt)
#   BEAM         beam size (5)
#   LENPEN       length penalty (1.0)
# The script prints perplexity on valid, then sacrebleu's cased BLEU and chrF on the raw test set (tokenised with 13a or,
# for Japanese, into characters) and, if there are further references, BLEU against all of them. WORK/table.md has a row for
# each direction and a column for each MODEL, with the scores of the run that was scored last, and compares the model with
# experts with the better of dense and deep by paired bootstrap. RUN/bundle is the model for nmt-moe translate.
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
BEAM=${BEAM:-5}
LENPEN=${LENPEN:-1.0}
BATCH_SIZE=${BATCH_SIZE:-64}
DEVICE=${DEVICE:-auto}
THREADS=${THREADS:-2}

# bleu_tokens LANGUAGE: print sacrebleu's tokeniser; Japanese has no spaces.
bleu_tokens() { if [[ $1 == ja ]]; then echo char; else echo 13a; fi; }

measure_perplexity() { # one line for each direction: DIRECTION PERPLEXITY
  logged "$RUN_FOLDER/validate.log" fairseq-validate "$WORK_FOLDER/data-bin" --user-dir "$REPOSITORY/nmt_moe" \
    "${TASK_FLAGS[@]}" --lang-pairs "$(IFS=,; printf '%s' "${SCORED[*]}")" --path "$CHECKPOINT" --valid-subset valid \
    --max-tokens 4000 --skip-invalid-size-inputs-valid-test --num-workers 0 "${EVERY_SENTENCE[@]}" \
    --log-format json "${DEVICE_FLAGS[@]}"
  python "$REPOSITORY/recipes/logs.py" perplexities "$RUN_FOLDER/validate.log"
}

score_direction() { # DIRECTION: one line, BLEU, chrF and BLEU against all references, or - if there is only one
  local source=${1%-*} target=${1#*-} pair reference further tokens bleu chrf all=- output=$RUN_FOLDER/translations/test.$1
  if [[ $source == en ]]; then pair=$1; else pair=en-$source; fi
  reference=$WORK_FOLDER/text/test.$pair.$target
  tokens=$(bleu_tokens "$target")
  translate_logged "$output" "$WORK_FOLDER/data-bin" "${TASK_FLAGS[@]}" --lang-pairs "$LANG_PAIRS" \
    --source-lang "$source" --target-lang "$target" --path "$CHECKPOINT" --gen-subset test --beam "$BEAM" \
    --lenpen "$LENPEN" --batch-size "$BATCH_SIZE" --remove-bpe sentencepiece
  nmt-moe check-parallel --allow-empty "$output" "$reference" >/dev/null
  quietly sacrebleu "$reference" -i "$output" --metrics bleu chrf --tokenize "$tokens" --format json >"$output.scores.json"
  bleu=$(only_score bleu "$output" "$tokens" "$reference")
  chrf=$(only_score chrf "$output" "$tokens" "$reference")
  further=("$reference".[0-9]*)
  [[ ! -f ${further[0]} ]] || all=$(only_score bleu "$output" "$tokens" "$reference" "${further[@]}")
  printf '%s %s %s' "$bleu" "$chrf" "$all"
}

# only_score METRIC TRANSLATION TOKENS REFERENCE...: print a score with two decimals.
only_score() {
  quietly sacrebleu "${@:4}" -i "$2" --metrics "$1" --tokenize "$3" --score-only --width 2 --format text
}

(($# == 0)) || die "evaluate.sh takes no arguments except --help, but was given '$1'; set its variables instead"
require_choice MODEL moe dense deep single
check_settings
SCORED=("${DIRECTIONS[@]}")
NAME=$MODEL
if [[ $MODEL == single ]]; then
  require_choice DIRECTION "${DIRECTIONS[@]}"
  SCORED=("$DIRECTION")
  NAME=single-$DIRECTION
fi
RUN=${RUN:-$NAME-seed$SEED}
RUN_FOLDER=$WORK_FOLDER/$RUN
CHECKPOINT=${CHECKPOINT:-$RUN_FOLDER/average.pt}
[[ -f $CHECKPOINT ]] ||
  die "$CHECKPOINT is missing: train it with recipes/multilingual/train.sh and the same variables, or set RUN or CHECKPOINT"
use_environment
set_device
export OMP_NUM_THREADS=$THREADS
mkdir -p "$RUN_FOLDER/translations"
say "scoring $RUN"
measure_perplexity >"$RUN_FOLDER/perplexities.txt"
unfinished=$RUN_FOLDER/scores.unfinished
rm -f "$unfinished"
for direction in "${SCORED[@]}"; do
  scores=$(score_direction "$direction")
  perplexity=$(awk -v name="$direction" '$1 == name { print $2 }' "$RUN_FOLDER/perplexities.txt")
  say "$direction: perplexity on valid $perplexity; test BLEU, chrF, BLEU against all references: $scores"
  printf '%s\t%s\t%s\t%s\n' "$MODEL" "$direction" "$perplexity" "$scores" >>"$unfinished"
done
mv "$unfinished" "$RUN_FOLDER/scores.tsv"
python "$HERE/table.py" "$WORK_FOLDER" | tee "$WORK_FOLDER/table.md"
export_bundle "$CHECKPOINT" "$RUN_FOLDER/bundle" --data "$WORK_FOLDER/data-bin" --pieces "$WORK_FOLDER/spm.model" \
  --beam "$BEAM" --lenpen "$LENPEN" --scores "$RUN_FOLDER/scores.tsv"
