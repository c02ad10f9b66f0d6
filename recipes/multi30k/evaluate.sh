#!/usr/bin/env bash
# Translate val and test_2016_flickr with a trained model and score both: evaluate.sh [PAIR...]
#
# PAIR: de or fr (from English); default: both. The script tries each length penalty on val, keeps the one with the best
# lower-cased tokenised BLEU, and only then translates the test set, once.
#   RUN          the run of train.sh (MODEL-seedSEED)
#   CHECKPOINT   the model, or several separated by colons for an ensemble (RUN's average.pt)
#   BEAM         beam size (5)
#   LENPENS      length penalties to try on val ("0.4 0.6 0.8 1.0 1.2 1.4 1.6"); larger ones favour longer translations
#   DEVICE, THREADS, CASE, WORK as in train.sh
# Finally, the script writes the model as a bundle, RUN/bundle, for nmt-moe translate (except for an ensemble, and with
# CASE=lower, where the text is tokenised). It prints two scores, each with sacrebleu's signature:
#   lower-cased tokenised BLEU: translations converted to the form of the official lc.norm.tok file and compared with it;
#   cased BLEU (13a) and chrF against the raw text (not with CASE=lower).
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/multi30k
manual_if_asked "${1:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$HERE/settings.sh"

RUN=${RUN:-${MODEL:-moe}-seed${SEED:-1}}
BEAM=${BEAM:-5}
LENPENS=${LENPENS:-0.4 0.6 0.8 1.0 1.2 1.4 1.6}
BATCH_SIZE=${BATCH_SIZE:-64}
DEVICE=${DEVICE:-auto}
THREADS=${THREADS:-2}

# checkpoints_of PAIR: print the model to evaluate, or several separated by colons.
checkpoints_of() { printf '%s' "${CHECKPOINT:-$(work_folder "$1")/$RUN/average.pt}"; }

# translate PAIR OUTPUT SUBSET SPLIT LENPEN: translate into OUTPUT, and beside it in the official form.
translate() {
  local pair=$1 output=$2 folder
  folder=$(work_folder "$pair")
  OMP_NUM_THREADS=$THREADS translate_logged "$output" "$folder/data-bin" --path "$(checkpoints_of "$pair")" --gen-subset "$3" \
    --beam "$BEAM" --lenpen "$5" --batch-size "$BATCH_SIZE" --remove-bpe sentencepiece
  nmt-moe check-parallel --allow-empty "$output" "$folder/text/$4.$pair" >/dev/null
  if [[ $CASE == lower ]]; then
    cp "$output" "$output.lc.norm.tok"
  else
    python "$HERE/moses_text.py" "$pair" <"$output" >"$output.lc.norm.tok"
  fi
}

# score_tokenised PAIR OUTPUT SPLIT FORMAT-FLAG...: score a translation. The official file is already tokenised, so
# sacrebleu must not tokenise it again; --force says that this is intended.
score_tokenised() {
  quietly sacrebleu "$(work_folder "$1")/text/$3.lc.norm.tok.$1" -i "$2.lc.norm.tok" --tokenize none --force "${@:4}"
}

report() { # PAIR OUTPUT SPLIT LENPEN
  local tokenised cased
  tokenised=$(score_tokenised "$1" "$2" "$3" --format text)
  printf '%s, en-%s, %s, beam %s, length penalty %s\n' "$3" "$1" "$RUN" "$BEAM" "$4"
  printf '  lower-cased tokenised  %s\n' "$tokenised"
  if [[ $CASE != lower ]]; then
    cased=$(quietly sacrebleu "$(work_folder "$1")/text/$3.$1" -i "$2" --metrics bleu chrf --format text)
    printf '  cased  %s\n' "${cased//$'\n'/$'\n  cased  '}"
  fi
}

export_translator() { # PAIR LENPEN
  local flags=() folder
  folder=$(work_folder "$1")
  [[ $CASE == cased ]] || flags=(--lowercase)
  export_bundle "$(checkpoints_of "$1")" "$folder/$RUN/bundle" --data "$folder/data-bin" --pieces "$folder/spm.model" \
    --beam "$BEAM" --lenpen "$2" --scores "$folder/$RUN/scores.txt" "${flags[@]}"
}

evaluate_pair() { # PAIR
  local pair=$1 lenpen score best="" best_score=-1 file folder outputs checkpoints
  folder=$(work_folder "$pair")/$RUN
  checkpoints=$(checkpoints_of "$pair")
  for file in ${checkpoints//:/ }; do
    [[ -f $file ]] ||
      die "$file is missing: train it with 'RUN=$RUN bash recipes/multi30k/train.sh $pair', or set RUN or CHECKPOINT"
  done
  outputs=$folder/translations
  mkdir -p "$outputs"
  for lenpen in $LENPENS; do
    translate "$pair" "$outputs/val.lenpen$lenpen" valid val "$lenpen"
    score=$(score_tokenised "$pair" "$outputs/val.lenpen$lenpen" val --score-only --width 2)
    say "val, length penalty $lenpen: lower-cased tokenised BLEU $score"
    if awk "BEGIN { exit !($score > $best_score) }"; then
      best_score=$score
      best=$lenpen
    fi
  done
  report "$pair" "$outputs/val.lenpen$best" val "$best" | tee "$folder/scores.txt"
  translate "$pair" "$outputs/test_2016_flickr" test test_2016_flickr "$best"
  report "$pair" "$outputs/test_2016_flickr" test_2016_flickr "$best" | tee -a "$folder/scores.txt"
  say "translations and scores: $folder"
  [[ $checkpoints == *:* || $CASE == lower ]] || export_translator "$pair" "$best"
}

parse_pairs "$@"
((${#FLAGS[@]} == 0)) || die "evaluate.sh takes no flags except --help, but was given '${FLAGS[0]}'"
check_settings
for name in $LENPENS; do [[ $name =~ ^-?[0-9]+(\.[0-9]+)?$ ]] || die "LENPENS must be numbers, but contains '$name'"; done
use_environment
set_device
# shellcheck disable=SC2153
for pair in "${PAIRS[@]}"; do evaluate_pair "$pair"; done
