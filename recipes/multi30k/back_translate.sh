#!/usr/bin/env bash
# Train on Multi30k and on back-translated captions: MONOLINGUAL=captions.de.gz back_translate.sh PAIR [FLAG-OF-FAIRSEQ-TRAIN...]
#
# A translator can also learn from text that exists only in the target language: a model for the reverse direction translates
# the text, and the translator is trained with this translation as source and the original text as target. The script
# trains a model from PAIR to English, translates MONOLINGUAL into English, and calls train.sh on these pairs and the
# pairs of the corpus. Finished steps are skipped.
#   PAIR              de or fr
#   MONOLINGUAL       text in PAIR's language, one sentence per line, plain, .gz or .xz (no default)
#   COPIES            how many times the training text contains the corpus's own sentence pairs (3)
#   REVERSE_UPDATES   updates of the reverse model (6000)
#   REVERSE_BEAM      beam size of the reverse model (2)
#   WORK              output folder (recipes/multi30k/work/PAIR-CASE, or work/PAIR if CASE is cased); it contains the reverse
#                     model, and WORK-extra contains the model that is trained last
# The last step uses all variables of train.sh, prepare.sh and evaluate.sh; to call evaluate.sh by itself, set WORK=WORK-extra.
# Lines of MONOLINGUAL that are also in val or the test set, regardless of case and a final full stop, are left out.
#
# Source: Sennrich et al. 2016, "Improving Neural Machine Translation Models with Monolingual Data".
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/multi30k
manual_if_asked "${1:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$HERE/settings.sh"

MONOLINGUAL=${MONOLINGUAL:-}
COPIES=${COPIES:-3}
REVERSE_UPDATES=${REVERSE_UPDATES:-6000}
REVERSE_BEAM=${REVERSE_BEAM:-2}
THREADS=${THREADS:-2}

train_reverse() { # PAIR FOLDER
  env WORK="$2" RUN=reverse UPDATES="$REVERSE_UPDATES" WARMUP_UPDATES=1000 DROPOUT=0.2 EVALUATE=0 EXTRA= COPIES=1 SAMPLES=0 \
    bash "$HERE/train.sh" "$1" --source-lang "$1" --target-lang en
  export_bundle "$2/reverse/average.pt" "$2/reverse/bundle" --data "$2/data-bin" --pieces "$2/spm.model" \
    --source-lang "$1" --target-lang en
}

back_translate() { # PAIR FOLDER
  python "$HERE/select_lines.py" "$MONOLINGUAL" --output "$2/monolingual.$1" \
    --without "$2/text/val.$1" --without "$2/text/test_2016_flickr.$1"
  nmt-moe translate "$2/reverse/bundle" "$2/monolingual.$1" --beam "$REVERSE_BEAM" --threads "$THREADS" --progress \
    --output "$2/monolingual.en"
}

train_on_both() { # PAIR FOLDER
  env WORK="$2-extra" EXTRA="$2/monolingual" COPIES="$COPIES" bash "$HERE/train.sh" "$1" "${FLAGS[@]}"
}

parse_pairs "$@"
((${#PAIRS[@]} == 1)) || die "back_translate.sh takes one PAIR, de or fr"
[[ -n $MONOLINGUAL ]] || die "MONOLINGUAL must name a text in the target language, but is empty"
[[ -f $MONOLINGUAL ]] || die "MONOLINGUAL=$MONOLINGUAL: the file is missing"
require_choice CASE cased source-lower
check_settings
for name in REVERSE_UPDATES REVERSE_BEAM COPIES; do require_whole "$name" 1; done
use_environment
export CASE THREADS
pair=${PAIRS[0]}
folder=$(work_folder "$pair")
key=$(step_key "" reverse "$REVERSE_UPDATES")
run_step "$folder" reverse "$key" train_reverse "$pair" "$folder"
key=$(step_key "$key" back-translate "$REVERSE_BEAM $(digest <"$MONOLINGUAL")")
run_step "$folder" back-translate "$key" back_translate "$pair" "$folder"
train_on_both "$pair" "$folder"
