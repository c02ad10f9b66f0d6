#!/usr/bin/env bash
# Prepare Multi30k for training: prepare.sh [PAIR...]        PAIR: de or fr (English to it); default: both
#
# Fetches and verifies the texts, learns one sentencepiece vocabulary for both languages, and writes fairseq's
# data-bin. Finished steps are skipped; a changed variable repeats what depends on it. Variables:
#   MULTI30K_DIR  a folder with the files of multi30k/dataset (data/task1); without it they are downloaded
#   CASE          source-lower (default): the raw text with the English side lower-cased, its case says little;
#                 one model for the cased and the lower-cased score
#                 cased: the raw text as written
#                 lower: the official lower-cased, tokenised text; only the lower-cased score is possible
#   VOCAB_SIZE    pieces of the joint vocabulary (5000)
#   PIECE_TYPE    unigram or bpe (unigram)
#   SAMPLES       further copies of the training text, each cut into pieces differently at random (0)
#   SAMPLE_ALPHA  unigram: sharpness of the random cuts; bpe: share of merges left out (0.2)
#   WORK          folder to write (recipes/multi30k/work/PAIR, or PAIR-CASE when not cased); with one PAIR only
#   THREADS       processes for binarising (2)
#   SHA256SUMS    digests to verify (recipes/multi30k/SHA256SUMS)
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
THREADS=${THREADS:-2}
SHA256SUMS=${SHA256SUMS:-$HERE/SHA256SUMS}

# official name of a split -> ours
SPLITS=(train val test_2016_flickr)

fetch_texts() { # one folder of raw text, one of the official lower-cased, tokenised text
  local split language kind names=()
  for language in en "$PAIR"; do
    for split in "${SPLITS[@]}"; do names+=("$split.$language" "$split.lc.norm.tok.$language"); done
  done
  python "$HERE/fetch.py" "${names[@]}" --target "$WORK_FOLDER/text" --digests "$SHA256SUMS" \
    ${MULTI30K_DIR:+--folder "$MULTI30K_DIR"}
  for split in "${SPLITS[@]}"; do
    for kind in "" .lc.norm.tok; do
      nmt-moe check-parallel "$WORK_FOLDER/text/$split$kind".{en,"$PAIR"}
    done
  done
}

select_texts() { # the form of the text that is trained on
  local split language kind=""
  [[ $CASE == lower ]] && kind=.lc.norm.tok
  mkdir -p "$WORK_FOLDER/selected"
  for split in "${SPLITS[@]}"; do
    for language in en "$PAIR"; do
      cp "$WORK_FOLDER/text/$split$kind.$language" "$WORK_FOLDER/selected/$split.$language"
    done
    if [[ $CASE == source-lower ]]; then
      python -c 'import sys; sys.stdout.writelines(line.lower() for line in sys.stdin)' \
        <"$WORK_FOLDER/text/$split.en" >"$WORK_FOLDER/selected/$split.en"
    fi
  done
}

learn_pieces() {
  nmt-moe pieces train --vocab-size "$VOCAB_SIZE" --model-type "$PIECE_TYPE" \
    --model "$WORK_FOLDER/spm.model" --dictionary "$WORK_FOLDER/dict.txt" --inputs "$WORK_FOLDER"/selected/train.{en,"$PAIR"}
}

cut_texts() { # only the training text is cut in several ways; the two sides are cut independently
  local split samples
  mkdir -p "$WORK_FOLDER/pieces"
  for split in "${SPLITS[@]}"; do
    samples=0
    [[ $split == train ]] && samples=$SAMPLES
    nmt-moe pieces encode --model "$WORK_FOLDER/spm.model" --samples "$samples" --alpha "$SAMPLE_ALPHA" \
      --inputs "$WORK_FOLDER/selected/$split".{en,"$PAIR"} --outputs "$WORK_FOLDER/pieces/$split".{en,"$PAIR"}
    nmt-moe check-parallel "$WORK_FOLDER/pieces/$split".{en,"$PAIR"}
  done
}

binarise() {
  rm -rf "$WORK_FOLDER/data-bin"
  logged "$WORK_FOLDER/preprocess.log" fairseq-preprocess --source-lang en --target-lang "$PAIR" \
    --trainpref "$WORK_FOLDER/pieces/train" --validpref "$WORK_FOLDER/pieces/val" \
    --testpref "$WORK_FOLDER/pieces/test_2016_flickr" \
    --srcdict "$WORK_FOLDER/dict.txt" --tgtdict "$WORK_FOLDER/dict.txt" --destdir "$WORK_FOLDER/data-bin" \
    --workers "$THREADS"
}

prepare_pair() {
  PAIR=$1
  WORK_FOLDER=$(work_folder "$PAIR")
  say "preparing English to $PAIR in $WORK_FOLDER"
  begin_steps "$WORK_FOLDER"
  run_step fetch "$PAIR $MULTI30K_DIR $(digest <"$SHA256SUMS")" fetch_texts
  run_step select "$CASE" select_texts
  run_step learn-pieces "$VOCAB_SIZE $PIECE_TYPE" learn_pieces
  run_step cut "$SAMPLES $SAMPLE_ALPHA" cut_texts
  run_step binarise "" binarise
  # train.sh resumes a model only on the text it was trained on.
  printf '%s' "$STEP_KEY" >"$WORK_FOLDER/prepared"
}

parse_pairs "$@"
((${#FLAGS[@]} == 0)) || die "prepare.sh takes no flags but --help, not '${FLAGS[0]}'"
check_settings
require_choice PIECE_TYPE unigram bpe
[[ -f $SHA256SUMS ]] || die "SHA256SUMS=$SHA256SUMS is missing"
use_environment
# shellcheck disable=SC2153
for pair in "${PAIRS[@]}"; do prepare_pair "$pair"; done
