#!/usr/bin/env bash
# Train on Multi30k and on translated monolingual text: SOURCE_TEXT=captions.en.gz monolingual.sh PAIR [FLAG-OF-FAIRSEQ-TRAIN...]
#
# A translator can also learn from text that exists only in one language. A trained model translates it, and train.sh then
# trains a new model on these sentence pairs and the pairs of the corpus. Finished steps are skipped.
#   PAIR              de or fr
#   SOURCE_TEXT       English text, one sentence per line, plain, .gz or .xz; it is translated by TEACHER (self-training)
#   TARGET_TEXT       text in PAIR's language in the same form; it is translated into English by a model for the reverse
#                     direction, which the script trains first (back-translation). At least one of the two texts is needed
#   TEACHER           run of train.sh that translates SOURCE_TEXT, with its own beam size and length penalty (moe-seed1)
#   COPIES            how many times the training text contains the corpus's own sentence pairs (3)
#   REVERSE_UPDATES   updates of the reverse model (6000)
#   REVERSE_BEAM      beam size of the reverse model (2)
#   WORK              folder with TEACHER (recipes/multi30k/work/PAIR-CASE, or work/PAIR if CASE is cased); it also contains the
#                     reverse model, and WORK-extra contains the model that is trained last
# The last step uses all variables of train.sh, prepare.sh and evaluate.sh; to call evaluate.sh by itself, set WORK=WORK-extra.
# Sentences that are also in val or the test set, regardless of case and a final full stop, are left out.
#
# Sources: Kim and Rush 2016, "Sequence-Level Knowledge Distillation"; He et al. 2020, "Revisiting Self-Training for Neural
# Sequence Generation"; Sennrich et al. 2016, "Improving Neural Machine Translation Models with Monolingual Data".
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/multi30k
manual_if_asked "${1:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$HERE/settings.sh"

SOURCE_TEXT=${SOURCE_TEXT:-}
TARGET_TEXT=${TARGET_TEXT:-}
TEACHER=${TEACHER:-moe-seed1}
COPIES=${COPIES:-3}
REVERSE_UPDATES=${REVERSE_UPDATES:-6000}
REVERSE_BEAM=${REVERSE_BEAM:-2}
THREADS=${THREADS:-2}

# select_text TEXT LANGUAGE FOLDER OUTPUT: leave out what is scored.
select_text() {
  python "$HERE/select_lines.py" "$1" --output "$4" --without "$3/text/val.$2" --without "$3/text/test_2016_flickr.$2"
}

translate_text() { # BUNDLE INPUT OUTPUT FLAG...
  nmt-moe translate "$1" "$2" --threads "$THREADS" --progress --output "$3" "${@:4}"
}

forward_translate() { # PAIR FOLDER
  select_text "$SOURCE_TEXT" en "$2" "$2/forward.en"
  translate_text "$2/$TEACHER/bundle" "$2/forward.en" "$2/forward.$1"
}

train_reverse() { # PAIR FOLDER: the network of the last step, but a schedule of its own (empty variables have their defaults)
  env WORK="$2" RUN=reverse UPDATES="$REVERSE_UPDATES" WARMUP_UPDATES=1000 DROPOUT=0.2 EVALUATE=0 EXTRA= COPIES=1 SAMPLES=0 \
    MAX_TOKENS= UPDATE_FREQ= LEARNING_RATE= \
    bash "$HERE/train.sh" "$1" --source-lang "$1" --target-lang en
  export_bundle "$2/reverse/average.pt" "$2/reverse/bundle" --data "$2/data-bin" --pieces "$2/spm.model" \
    --source-lang "$1" --target-lang en
}

back_translate() { # PAIR FOLDER
  select_text "$TARGET_TEXT" "$1" "$2" "$2/back.$1"
  translate_text "$2/reverse/bundle" "$2/back.$1" "$2/back.en" --beam "$REVERSE_BEAM"
}

# join_texts PAIR FOLDER KIND...: write the pairs of all kinds, forward and back, as FOLDER/extra, with English in the form
# that CASE specifies (the reverse model writes that form). A model may write nothing for a line; such pairs are left out.
join_texts() {
  local kind
  rm -f "$2"/extra.{en,"$1"}
  for kind in "${@:3}"; do
    paste "$2/$kind".{en,"$1"} | awk -F '\t' '$1 != "" && $2 != ""' >"$2/$kind.pairs"
    if [[ $kind == forward && $CASE == source-lower ]]; then
      cut -f 1 "$2/$kind.pairs" | lower_case >>"$2/extra.en"
    else
      cut -f 1 "$2/$kind.pairs" >>"$2/extra.en"
    fi
    cut -f 2 "$2/$kind.pairs" >>"$2/extra.$1"
  done
}

train_on_all() { # PAIR FOLDER
  env WORK="$2-extra" EXTRA="$2/extra" COPIES="$COPIES" bash "$HERE/train.sh" "$1" "${FLAGS[@]}"
}

parse_pairs "$@"
((${#PAIRS[@]} == 1)) || die "monolingual.sh takes one PAIR, de or fr"
pair=${PAIRS[0]}
folder=$(work_folder "$pair")
[[ -n $SOURCE_TEXT$TARGET_TEXT ]] || die "SOURCE_TEXT or TARGET_TEXT must name a text, but both are empty"
for name in SOURCE_TEXT TARGET_TEXT; do
  [[ -z ${!name} || -f ${!name} ]] || die "$name=${!name}: the file is missing"
done
[[ -z $SOURCE_TEXT || -d $folder/$TEACHER/bundle ]] ||
  die "$folder/$TEACHER/bundle is missing: train it with 'RUN=$TEACHER bash recipes/multi30k/train.sh $pair', or set TEACHER"
require_choice CASE cased source-lower
check_settings
for name in REVERSE_UPDATES REVERSE_BEAM COPIES; do require_whole "$name" 1; done
use_environment
export CASE THREADS
kinds=()
if [[ -n $SOURCE_TEXT ]]; then
  key=$(step_key "" forward-translate "$(cat "$folder/$TEACHER"/bundle/* | digest) $(digest <"$SOURCE_TEXT")")
  run_step "$folder" forward-translate "$key" forward_translate "$pair" "$folder"
  kinds+=(forward)
fi
if [[ -n $TARGET_TEXT ]]; then
  key=$(step_key "" reverse "$REVERSE_UPDATES")
  run_step "$folder" reverse "$key" train_reverse "$pair" "$folder"
  key=$(step_key "$key" back-translate "$REVERSE_BEAM $(digest <"$TARGET_TEXT")")
  run_step "$folder" back-translate "$key" back_translate "$pair" "$folder"
  kinds+=(back)
fi
join_texts "$pair" "$folder" "${kinds[@]}"
train_on_all "$pair" "$folder"
