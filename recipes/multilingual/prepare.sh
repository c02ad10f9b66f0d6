#!/usr/bin/env bash
# Prepare English and other languages for one multilingual model: prepare.sh
#
# This script copies the texts, learns one sentencepiece vocabulary for all languages, and writes fairseq's data-bin.
# Finished steps are skipped; changing a variable repeats the steps that depend on it. Variables:
#   CORPUS        tatoeba (default) or multi30k; result.md and recipes/README.md say where to get them
#   TATOEBA_DIR   folder with en-XX/{train,dev,devtest}.{en,XX}.gz, one sentence per line. If there is also
#                 en-XX/devtest.refs.en-XX.tsv.gz (a row for each sentence of devtest: English, then all its translations),
#                 the table has BLEU against all translations, too
#   MULTI30K_DIR  folder with {train,val,test_2016_flickr}.{en,XX}.gz
#   LANGUAGES     languages other than English ("fr de ja ko pt es" for tatoeba, "fr de cs" for multi30k)
#   MAX_PAIRS     maximum number of training pairs for each language (all)
#   VOCAB_SIZE    pieces in the shared vocabulary (8000)
#   WORK          output folder (recipes/multilingual/work/CORPUS-LANGUAGES)
#   THREADS       processes for binarising (2)
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/multilingual
manual_if_asked "${1:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$HERE/settings.sh"

MAX_PAIRS=${MAX_PAIRS:-999999999}
VOCAB_SIZE=${VOCAB_SIZE:-8000}
THREADS=${THREADS:-2}
if [[ $CORPUS == tatoeba ]]; then
  FOLDER=${TATOEBA_DIR:-}
  FOLDER_NAME=TATOEBA_DIR
  declare -A FILES=([train]=train [valid]=dev [test]=devtest)
else
  FOLDER=${MULTI30K_DIR:-}
  FOLDER_NAME=MULTI30K_DIR
  declare -A FILES=([train]=train [valid]=val [test]=test_2016_flickr)
fi

# original SPLIT PAIR LANGUAGE: print the path of the corpus's own file, gzipped or plain.
original() {
  local name=${FILES[$1]}.$3
  [[ $CORPUS == multi30k ]] || name=$2/$name
  local path
  for path in "$FOLDER/$name.gz" "$FOLDER/$name"; do
    if [[ -f $path ]]; then
      printf '%s' "$path"
      return
    fi
  done
  die "$FOLDER/$name.gz is missing: $FOLDER_NAME must have the text of every language of LANGUAGES='$LANGUAGES'"
}

# copy_further_references LANGUAGE: write text/test.en-XX.XX.2, .3, ...: the second, third, ... translation of each English
# sentence, or an empty line. sacrebleu ignores empty references.
copy_further_references() {
  local rows=$FOLDER/en-$1/devtest.refs.en-$1.tsv.gz text=$WORK_FOLDER/text/test.en-$1
  [[ $CORPUS == tatoeba && -f $rows ]] || return 0
  gzip -cd "$rows" | cut -f1 | cmp -s - "$text.en" || die "$rows must have a row for each line of devtest.en.gz, in its order"
  gzip -cd "$rows" | awk -F '\t' -v output="$text.$1" '
    { row[NR] = $0; if (NF > columns) columns = NF }
    END {
      for (column = 3; column <= columns; column++)
        for (i = 1; i <= NR; i++) { split(row[i], cells); print cells[column] >(output "." column - 1) }
    }'
}

copy_texts() {
  local language pair side split limit path
  rm -rf "$WORK_FOLDER/text"
  mkdir -p "$WORK_FOLDER/text"
  for language in $LANGUAGES; do
    pair=en-$language
    for split in "${SPLITS[@]}"; do
      limit=999999999
      [[ $split != train ]] || limit=$MAX_PAIRS
      for side in en "$language"; do
        path=$(original "$split" "$pair" "$side")
        # gzip -f passes through a file that is not gzipped. awk reads to the end, so that no pipe breaks.
        gzip -cdf "$path" | awk -v limit="$limit" 'NR <= limit' >"$WORK_FOLDER/text/$split.$pair.$side"
      done
      nmt-moe check-parallel "$WORK_FOLDER/text/$split.$pair".{en,"$language"}
    done
    copy_further_references "$language"
  done
}

learn_pieces() { # from each distinct English line once, because English is in every pair
  local language files=()
  cat "$WORK_FOLDER"/text/train.en-*.en | sort -u >"$WORK_FOLDER/unique.en"
  for language in $LANGUAGES; do files+=("$WORK_FOLDER/text/train.en-$language.$language"); done
  nmt-moe pieces train --vocab-size "$VOCAB_SIZE" --model "$WORK_FOLDER/spm.model" \
    --dictionary "$WORK_FOLDER/dict.txt" --inputs "$WORK_FOLDER/unique.en" "${files[@]}"
}

cut_texts() {
  local language split names=()
  mkdir -p "$WORK_FOLDER/pieces"
  for language in $LANGUAGES; do
    for split in "${SPLITS[@]}"; do names+=("$split.en-$language".{en,"$language"}); done
  done
  nmt-moe pieces encode --model "$WORK_FOLDER/spm.model" --inputs "${names[@]/#/$WORK_FOLDER/text/}" \
    --outputs "${names[@]/#/$WORK_FOLDER/pieces/}"
}

binarise() { # a pair's two directions read the same files
  local language
  rm -rf "$WORK_FOLDER/data-bin"
  for language in $LANGUAGES; do
    logged "$WORK_FOLDER/preprocess.$language.log" fairseq-preprocess --source-lang en --target-lang "$language" \
      --trainpref "$WORK_FOLDER/pieces/train.en-$language" --validpref "$WORK_FOLDER/pieces/valid.en-$language" \
      --testpref "$WORK_FOLDER/pieces/test.en-$language" --srcdict "$WORK_FOLDER/dict.txt" \
      --tgtdict "$WORK_FOLDER/dict.txt" --destdir "$WORK_FOLDER/data-bin" --workers "$THREADS"
  done
}

(($# == 0)) || die "prepare.sh takes no arguments except --help, but was given '$1'; set its variables instead"
check_settings
[[ -n $FOLDER ]] || die "$FOLDER_NAME must name the folder with the texts of CORPUS=$CORPUS, but is not set"
[[ -d $FOLDER ]] || die "$FOLDER_NAME=$FOLDER is not a folder"
use_environment
say "preparing English and $LANGUAGES in $WORK_FOLDER"
mkdir -p "$WORK_FOLDER"
key=$(step_key "" copy-with-references "$CORPUS $FOLDER $LANGUAGES $MAX_PAIRS")
run_step "$WORK_FOLDER" copy "$key" copy_texts
key=$(step_key "$key" learn-pieces "$VOCAB_SIZE")
run_step "$WORK_FOLDER" learn-pieces "$key" learn_pieces
key=$(step_key "$key" cut "")
run_step "$WORK_FOLDER" cut "$key" cut_texts
key=$(step_key "$key" binarise "")
run_step "$WORK_FOLDER" binarise "$key" binarise
# train.sh resumes training only on the text that the model was trained on.
printf '%s' "$key" >"$WORK_FOLDER/prepared"
