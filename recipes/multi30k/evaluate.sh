#!/usr/bin/env bash
# Translate val and test_2016_flickr with a trained model and score both: evaluate.sh [PAIR...]
#
# PAIR: de or fr (English to it); default: both. Tries each length penalty on val, keeps the best by lower-cased
# tokenised BLEU, and only then translates the test set, once.
#   RUN          the run of train.sh (MODEL-seedSEED)
#   CHECKPOINT   the model, or several with colons between for an ensemble (RUN's average.pt)
#   BEAM         hypotheses kept (5)
#   LENPENS      length penalties to try on val ("0.4 0.6 0.8 1.0 1.2 1.4 1.6"): larger ones prefer longer translations
#   DEVICE, THREADS, CASE, WORK as in train.sh
# Two scores, each with sacrebleu's signature:
#   lower-cased tokenised BLEU: translations brought to the form of the official lc.norm.tok file and compared with it;
#   cased BLEU (13a) and chrF against the raw text (not with CASE=lower).
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/multi30k
if [[ ${1:-} == -h || ${1:-} == --help ]]; then
  print_manual "${BASH_SOURCE[0]}"
  exit
fi
# shellcheck source=SCRIPTDIR/settings.sh
source "$HERE/settings.sh"

RUN=${RUN:-${MODEL:-moe}-seed${SEED:-1}}
BEAM=${BEAM:-5}
LENPENS=${LENPENS:-0.4 0.6 0.8 1.0 1.2 1.4 1.6}
BATCH_SIZE=${BATCH_SIZE:-64}
DEVICE=${DEVICE:-auto}
THREADS=${THREADS:-2}

# translate SUBSET SPLIT LENPEN: into $OUTPUT, as the model writes it and in the official tokenised form.
translate() {
  LOG=$OUTPUT.log
  OMP_NUM_THREADS=$THREADS logged fairseq-generate "$WORK_FOLDER/data-bin" --user-dir "$REPOSITORY/nmt_moe" \
    --path "$CHECKPOINTS" --gen-subset "$1" --beam "$BEAM" --lenpen "$3" --batch-size "$BATCH_SIZE" \
    --remove-bpe sentencepiece --num-workers 0 "${EVERY_SENTENCE[@]}" "${DEVICE_FLAGS[@]}"
  hypotheses_of "$LOG" >"$OUTPUT"
  python "$REPOSITORY/tools/check_parallel.py" --allow-empty "$OUTPUT" "$WORK_FOLDER/text/$2.$PAIR" >/dev/null
  if [[ $CASE == lower ]]; then
    cp "$OUTPUT" "$OUTPUT.lc.norm.tok"
  else
    python "$HERE/moses_text.py" "$PAIR" <"$OUTPUT" >"$OUTPUT.lc.norm.tok"
  fi
}

# The official file is tokenised already: sacrebleu must take it as it is, and --force says that this is meant.
score_tokenised() { # SPLIT FORMAT-FLAG...
  local split=$1
  shift
  sacrebleu "$WORK_FOLDER/text/$split.lc.norm.tok.$PAIR" -i "$OUTPUT.lc.norm.tok" --tokenize none --force "$@"
}

report() { # SPLIT
  printf '%s, English to %s, %s, beam %s, length penalty %s\n' "$1" "$PAIR" "$RUN" "$BEAM" "$BEST"
  printf '  lower-cased tokenised  %s\n' "$(score_tokenised "$1" --format text 2>/dev/null)"
  if [[ $CASE != lower ]]; then
    sacrebleu "$WORK_FOLDER/text/$1.$PAIR" -i "$OUTPUT" --metrics bleu chrf --format text | sed 's/^/  cased  /'
  fi
}

evaluate_pair() {
  local lenpen score best_score=-1
  PAIR=$1
  WORK_FOLDER=$(work_folder "$PAIR")
  RUN_FOLDER=$WORK_FOLDER/$RUN
  CHECKPOINTS=${CHECKPOINT:-$RUN_FOLDER/average.pt}
  for file in ${CHECKPOINTS//:/ }; do
    [[ -f $file ]] ||
      die "$file is missing: train it with 'RUN=$RUN bash recipes/multi30k/train.sh $PAIR', or set RUN or CHECKPOINT"
  done
  mkdir -p "$RUN_FOLDER/translations"
  for lenpen in $LENPENS; do
    OUTPUT=$RUN_FOLDER/translations/val.lenpen$lenpen
    translate valid val "$lenpen"
    score=$(score_tokenised val --score-only --width 2 2>/dev/null)
    say "val, length penalty $lenpen: lower-cased tokenised BLEU $score"
    if awk "BEGIN { exit !($score > $best_score) }"; then
      best_score=$score
      BEST=$lenpen
    fi
  done
  OUTPUT=$RUN_FOLDER/translations/val.lenpen$BEST
  report val | tee "$RUN_FOLDER/scores.txt"
  OUTPUT=$RUN_FOLDER/translations/test_2016_flickr
  translate test test_2016_flickr "$BEST"
  report test_2016_flickr | tee -a "$RUN_FOLDER/scores.txt"
  say "translations and scores: $RUN_FOLDER"
}

parse_pairs "$@"
((${#FLAGS[@]} == 0)) || die "evaluate.sh takes no flags but --help, not '${FLAGS[0]}'"
require_whole BEAM 1
for name in $LENPENS; do [[ $name =~ ^-?[0-9]+(\.[0-9]+)?$ ]] || die "LENPENS must be numbers, but has '$name'"; done
use_environment
set_device
# shellcheck disable=SC2153
for pair in "${PAIRS[@]}"; do evaluate_pair "$pair"; done
