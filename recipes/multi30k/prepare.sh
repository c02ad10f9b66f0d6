#!/usr/bin/env bash
# Prepare Multi30k for training: prepare.sh [PAIR...]        PAIR: de or fr (from English); default: both
#
# This script fetches and verifies the texts, learns one sentencepiece vocabulary for both languages, and writes fairseq's
# data-bin. Finished steps are skipped; changing a variable repeats the steps that depend on it. Variables:
#   MULTI30K_DIR  a folder with the files of multi30k/dataset (data/task1); if not set, they are downloaded
#   CASE          source-lower (default): the raw text with the English side lower-cased, because capitalisation in English
#                 carries little information; translations can then be scored with or without regard to case
#                 cased: the raw text as written
#                 lower: the official lower-cased, tokenised text, which can only be scored lower-cased
#   VOCAB_SIZE    pieces in the joint vocabulary (5000)
#   PIECE_TYPE    unigram or bpe (unigram)
#   SAMPLES       additional copies of the training text, each with a different random split into pieces (0)
#   SAMPLE_ALPHA  unigram: inverse temperature of the distribution that splits are drawn from; bpe: share of
#                 merges left out (0.2)
#   EXTRA         additional sentence pairs to train on (files EXTRA.en and EXTRA.PAIR), in the form that CASE specifies
#                 (none); see monolingual.sh
#   COPIES        how many times the training text contains the corpus's own sentence pairs (1), to balance them against EXTRA
#   WORK          output folder (recipes/multi30k/work/PAIR-CASE, or work/PAIR if CASE is cased); only with one PAIR
#   THREADS       processes for binarising (2)
#   SHA256SUMS    file of digests to verify the texts against (recipes/multi30k/SHA256SUMS)
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/multi30k
manual_if_asked "${1:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$HERE/settings.sh"

MULTI30K_DIR=${MULTI30K_DIR:-}
VOCAB_SIZE=${VOCAB_SIZE:-5000}
PIECE_TYPE=${PIECE_TYPE:-unigram}
SAMPLES=${SAMPLES:-0}
SAMPLE_ALPHA=${SAMPLE_ALPHA:-0.2}
EXTRA=${EXTRA:-}
COPIES=${COPIES:-1}
THREADS=${THREADS:-2}
SHA256SUMS=${SHA256SUMS:-$HERE/SHA256SUMS}

# The official names of the splits.
SPLITS=(train val test_2016_flickr)

fetch_texts() { # PAIR FOLDER: raw text, and the official lower-cased, tokenised text
  local pair=$1 folder=$2
  local split language kind names=()
  for language in en "$pair"; do
    for split in "${SPLITS[@]}"; do names+=("$split.$language" "$split.lc.norm.tok.$language"); done
  done
  python "$HERE/fetch.py" "${names[@]}" --target "$folder/text" --digests "$SHA256SUMS" \
    ${MULTI30K_DIR:+--folder "$MULTI30K_DIR"}
  for split in "${SPLITS[@]}"; do
    for kind in "" .lc.norm.tok; do
      nmt-moe check-parallel "$folder/text/$split$kind".{en,"$pair"}
    done
  done
}

select_texts() { # PAIR FOLDER: the form of the text to train on
  local pair=$1 folder=$2
  local split language kind=""
  [[ $CASE == lower ]] && kind=.lc.norm.tok
  mkdir -p "$folder/selected"
  for split in "${SPLITS[@]}"; do
    for language in en "$pair"; do
      cp "$folder/text/$split$kind.$language" "$folder/selected/$split.$language"
    done
    if [[ $CASE == source-lower ]]; then
      lower_case <"$folder/text/$split.en" >"$folder/selected/$split.en"
    fi
  done
}

learn_pieces() { # PAIR FOLDER
  local pair=$1 folder=$2
  nmt-moe pieces train --vocab-size "$VOCAB_SIZE" --model-type "$PIECE_TYPE" \
    --model "$folder/spm.model" --dictionary "$folder/dict.txt" --inputs "$folder"/selected/train.{en,"$pair"}
}

# Print the training text of one LANGUAGE: the corpus's own text COPIES times, then EXTRA.
training_text() { # FOLDER LANGUAGE
  local copy
  for ((copy = 0; copy < COPIES; copy++)); do cat "$1/selected/train.$2"; done
  [[ -z $EXTRA ]] || cat "$EXTRA.$2"
}

cut_texts() { # PAIR FOLDER: only the training text is split in several ways; the two sides are split independently
  local pair=$1 folder=$2
  local split samples language texts
  mkdir -p "$folder/pieces"
  [[ -z $EXTRA ]] || nmt-moe check-parallel "$EXTRA".{en,"$pair"}
  for split in "${SPLITS[@]}"; do
    samples=0
    texts=$folder/selected/$split
    if [[ $split == train ]]; then
      samples=$SAMPLES
      texts=$folder/pieces/uncut
      for language in en "$pair"; do training_text "$folder" "$language" >"$texts.$language"; done
    fi
    nmt-moe pieces encode --model "$folder/spm.model" --samples "$samples" --alpha "$SAMPLE_ALPHA" \
      --inputs "$texts".{en,"$pair"} --outputs "$folder/pieces/$split".{en,"$pair"}
    nmt-moe check-parallel "$folder/pieces/$split".{en,"$pair"}
  done
  rm -f "$folder/pieces/uncut".*
}

binarise() { # PAIR FOLDER
  local pair=$1 folder=$2
  rm -rf "$folder/data-bin"
  logged "$folder/preprocess.log" fairseq-preprocess --source-lang en --target-lang "$pair" \
    --trainpref "$folder/pieces/train" --validpref "$folder/pieces/val" \
    --testpref "$folder/pieces/test_2016_flickr" \
    --srcdict "$folder/dict.txt" --tgtdict "$folder/dict.txt" --destdir "$folder/data-bin" \
    --workers "$THREADS"
}

# extra_key PAIR: print what COPIES and EXTRA add to the key of a step; nothing if only the corpus is used.
extra_key() {
  [[ $COPIES == 1 ]] || printf ' x%s' "$COPIES"
  [[ -z $EXTRA ]] || printf ' %s' "$(digest <"$EXTRA.en")" "$(digest <"$EXTRA.$1")"
}

prepare_pair() {
  local pair=$1 folder key
  folder=$(work_folder "$pair")
  say "preparing en-$pair in $folder"
  key=$(step_key "" fetch "$pair $MULTI30K_DIR $(digest <"$SHA256SUMS")")
  run_step "$folder" fetch "$key" fetch_texts "$pair" "$folder"
  key=$(step_key "$key" select "$CASE")
  run_step "$folder" select "$key" select_texts "$pair" "$folder"
  key=$(step_key "$key" learn-pieces "$VOCAB_SIZE $PIECE_TYPE")
  run_step "$folder" learn-pieces "$key" learn_pieces "$pair" "$folder"
  key=$(step_key "$key" cut "$SAMPLES $SAMPLE_ALPHA$(extra_key "$pair")")
  run_step "$folder" cut "$key" cut_texts "$pair" "$folder"
  key=$(step_key "$key" binarise "")
  run_step "$folder" binarise "$key" binarise "$pair" "$folder"
  # train.sh resumes training only on the text that the model was trained on.
  printf '%s' "$key" >"$folder/prepared"
}

parse_pairs "$@"
((${#FLAGS[@]} == 0)) || die "prepare.sh takes no flags except --help, but was given '${FLAGS[0]}'"
check_settings
require_choice PIECE_TYPE unigram bpe
require_whole COPIES 1
if [[ -n $EXTRA ]]; then
  for language in en "${PAIRS[@]}"; do [[ -f $EXTRA.$language ]] || die "EXTRA=$EXTRA: $EXTRA.$language is missing"; done
fi
[[ -f $SHA256SUMS ]] || die "SHA256SUMS=$SHA256SUMS: the file is missing"
use_environment
# shellcheck disable=SC2153
for pair in "${PAIRS[@]}"; do prepare_pair "$pair"; done
