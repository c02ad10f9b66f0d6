#!/usr/bin/env bash
# Prepare WMT14 as in the paper: prepare.sh [--dry-run]
#
# This script downloads and verifies the archives, extracts and cleans the corpora, learns one 32,000-piece vocabulary for
# both languages, splits the text and writes fairseq's data-bin. Finished steps are skipped, a failed step is repeated, and
# changing a variable repeats the steps that depend on it.
#   training text   en-de: Europarl v7, Common Crawl, News Commentary v9; en-fr: the same, and UN 2000 and Giga-fren
#   valid           newstest2012 and newstest2013, 6003 sentences
#   test            newstest2014, the full set of 3003 sentences
# --dry-run prints every step but runs none. Variables:
#   WMT14_MIRROR    address, file:///folder or http, to use instead of https://www.statmt.org and its mirrors; it must have the
#                   same folders (wmt13/training-parallel-europarl-v7.tgz, ...)
#   DOWNLOADS       folder for the archives, shared by both pairs (recipes/wmt14/work/downloads)
#   WORK            output folder (recipes/wmt14_en_PAIR/work)
#   THREADS         processes (all cores)
#   NORMALIZE       sides with normalised punctuation: source (default), both or none (see recipes/wmt14/README.md)
#   VOCAB_SIZE      pieces in the vocabulary (32000)
#   PIECE_TYPE      bpe (default, nearest to the paper's wordpieces) or unigram
#   SAMPLE_PAIRS    number of evenly spaced pairs to learn the vocabulary from (5000000); more need more memory
#   COVERAGE        share of the characters that the pieces must cover (0.9995), which excludes rare alphabets
#   MAX_PIECES      maximum length of a side of a training pair, in pieces (250)
#   MAX_RATIO       maximum ratio of the longer side to the shorter, in pieces (1.5)
#   MANIFEST        file of expected sizes, digests, names and numbers of lines (recipes/wmt14/manifest.json)
#
# Estimated disk space, including the archives: 50 GB for en-fr, 7 GB for en-de.
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
manual_if_asked "${2:-}"
# shellcheck source=SCRIPTDIR/settings.sh
source "$REPOSITORY/recipes/wmt14/settings.sh"
take_dry_run "${@:2}"

WMT14_MIRROR=${WMT14_MIRROR:-}
DOWNLOADS=${DOWNLOADS:-$HERE/work/downloads}
THREADS=${THREADS:-$(nproc)}
NORMALIZE=${NORMALIZE:-source}
VOCAB_SIZE=${VOCAB_SIZE:-32000}
PIECE_TYPE=${PIECE_TYPE:-bpe}
SAMPLE_PAIRS=${SAMPLE_PAIRS:-5000000}
COVERAGE=${COVERAGE:-0.9995}
MAX_PIECES=${MAX_PIECES:-250}
MAX_RATIO=${MAX_RATIO:-1.5}
MANIFEST=${MANIFEST:-$HERE/manifest.json}

archives() { # COMMAND [NAME] FLAG...
  python "$HERE/archives.py" "$@" --manifest "$MANIFEST" --mirror "$WMT14_MIRROR"
}

list_steps() { # set ARCHIVES and PARTS to those of the pair, and set their addresses, splits and settings
  local kind name about more listing
  listing=$(archives list --pair "$PAIR")
  ARCHIVES=() PARTS=()
  declare -gA ABOUT ADDRESSES SPLIT
  while IFS=$'\t' read -r kind name about more; do
    if [[ $kind == archive ]]; then
      ARCHIVES+=("$name")
      ABOUT[$name]=$about
      ADDRESSES[$name]=$more
    else
      PARTS+=("$name")
      SPLIT[$name]=$about
      ABOUT[$name]=$more
    fi
  done <<<"$listing"
}

# parts_of SPLIT: print the corpora of a split, as names of texts.
parts_of() {
  local name
  for name in "${PARTS[@]}"; do
    [[ ${SPLIT[$name]} != "$1" ]] || printf '%s\n' "$WORK/raw/$name"
  done
}

clean_texts() { # SPLIT FLAG...
  local split=$1 texts
  shift
  mapfile -t texts < <(parts_of "$split")
  python "$HERE/texts.py" clean --pair "$PAIR" --threads "$THREADS" --normalize "$NORMALIZE" \
    --target "$WORK/text/$split" "$@" "${texts[@]}"
}

clean_evaluation_texts() { # keeps all lines, and the original text as the reference
  local split language texts
  for split in valid test; do
    clean_texts "$split" --keep-all
    mapfile -t texts < <(parts_of "$split")
    for language in en "$PAIR"; do
      cat "${texts[@]/%/.$language}" >"$WORK/text/$split.reference.$language"
    done
    nmt-moe check-parallel "$WORK/text/$split".{en,"$PAIR",reference.en,"reference.$PAIR"}
  done
}

sample_text() { # every n-th pair, so that each corpus has its share
  local total every language
  total=$(wc -l <"$WORK/text/train.en")
  every=$(((total + SAMPLE_PAIRS - 1) / SAMPLE_PAIRS))
  for language in en "$PAIR"; do
    awk -v every="$every" 'NR % every == 0' "$WORK/text/train.$language" >"$WORK/text/sample.$language"
  done
  nmt-moe check-parallel "$WORK/text/sample".{en,"$PAIR"}
}

learn_pieces() {
  nmt-moe pieces train --vocab-size "$VOCAB_SIZE" --model-type "$PIECE_TYPE" \
    --character-coverage "$COVERAGE" --model "$WORK/spm.model" --dictionary "$WORK/dict.txt" \
    --inputs "$WORK/text/sample".{en,"$PAIR"}
}

cut_texts() { # SPLIT FLAG...
  local split=$1
  shift
  python "$HERE/texts.py" cut --pair "$PAIR" --threads "$THREADS" --model "$WORK/spm.model" \
    --max-pieces "$MAX_PIECES" --max-ratio "$MAX_RATIO" --target "$WORK/pieces/$split" "$@" "$WORK/text/$split"
}

cut_evaluation_texts() {
  local split
  for split in valid test; do
    cut_texts "$split" --keep-all --expect "$(wc -l <"$WORK/text/$split.en")"
  done
}

binarise() {
  local log=$WORK/preprocess.log
  rm -rf "$WORK/data-bin"
  logged "$log" fairseq-preprocess --source-lang en --target-lang "$PAIR" --trainpref "$WORK/pieces/train" \
    --validpref "$WORK/pieces/valid" --testpref "$WORK/pieces/test" --srcdict "$WORK/dict.txt" \
    --tgtdict "$WORK/dict.txt" --destdir "$WORK/data-bin" --workers "$THREADS"
  check_binarised "$log"
}

check_binarised() { # LOG: compare fairseq's own count of each side with the lines it received
  local split language lines
  for split in train valid test; do
    for language in en "$PAIR"; do
      lines=$(wc -l <"$WORK/pieces/$split.$language")
      grep -qF "$WORK/pieces/$split.$language: $lines sents," "$1" ||
        die "$1 does not say that $split.$language has $lines sentences: binarising went wrong"
    done
  done
}

((${#FLAGS[@]} == 0)) || die "prepare.sh takes no flags except --help and --dry-run, but was given '${FLAGS[0]}'"
check_settings
require_choice PIECE_TYPE bpe unigram
require_choice NORMALIZE source both none
[[ $MAX_RATIO =~ ^[1-9][0-9]*(\.[0-9]+)?$ ]] || die "MAX_RATIO must be a number of at least 1, but is '$MAX_RATIO'"
[[ $COVERAGE =~ ^(1(\.0+)?|0?\.[0-9]+)$ ]] || die "COVERAGE must be a share of 1, but is '$COVERAGE'"
[[ -z $WMT14_MIRROR || $WMT14_MIRROR =~ ^(file:///|https?://) ]] ||
  die "WMT14_MIRROR must begin with file:///, http:// or https://, but is '$WMT14_MIRROR'"
[[ -f $MANIFEST ]] || die "MANIFEST=$MANIFEST: the file is missing"
use_environment_unless_dry
list_steps
say "preparing en-$PAIR in $WORK"
key=""
for name in "${ARCHIVES[@]}"; do
  [[ $DRY_RUN == 0 ]] || printf '%s\n      %s\n      from %s\n' "$name" "${ABOUT[$name]}" "${ADDRESSES[$name]}"
  key=$(step_key "$key" "download-${name//\//-}" "${ABOUT[$name]}")
  run_step "$WORK" "download-${name//\//-}" "$key" archives fetch "$name" --downloads "$DOWNLOADS"
done
for name in "${PARTS[@]}"; do
  key=$(step_key "$key" "extract-$name" "${ABOUT[$name]}")
  run_step "$WORK" "extract-$name" "$key" \
    archives extract "$name" --pair "$PAIR" --downloads "$DOWNLOADS" --target "$WORK/raw"
done
key=$(step_key "$key" clean-train "$NORMALIZE")
run_step "$WORK" clean-train "$key" clean_texts train
key=$(step_key "$key" clean-valid-and-test "")
run_step "$WORK" clean-valid-and-test "$key" clean_evaluation_texts
key=$(step_key "$key" sample "$SAMPLE_PAIRS")
run_step "$WORK" sample "$key" sample_text
key=$(step_key "$key" learn-pieces "$VOCAB_SIZE $PIECE_TYPE $COVERAGE")
run_step "$WORK" learn-pieces "$key" learn_pieces
key=$(step_key "$key" cut-train "$MAX_PIECES $MAX_RATIO")
run_step "$WORK" cut-train "$key" cut_texts train
key=$(step_key "$key" cut-valid-and-test "")
run_step "$WORK" cut-valid-and-test "$key" cut_evaluation_texts
key=$(step_key "$key" binarise "")
run_step "$WORK" binarise "$key" binarise
[[ $DRY_RUN == 1 ]] || printf '%s' "$key" >"$WORK/prepared"
