#!/usr/bin/env bash
# Prepare the One Billion Word benchmark: prepare.sh
#
# This script downloads and verifies the public archive (1.8 GB; 4 GB unpacked), extracts training and held-out shards,
# compares the counts of the whole text with the published ones, counts the vocabulary, writes fairseq's data-bin, and
# compares the number of tokens in data-bin with the number of words in the text. Finished steps are skipped. Variables:
#   SLICE        1 uses the first 20,000 lines of one training shard, to try the recipe on a small machine (0)
#   SHARDS       number of training shards (99, which is all; 1 with SLICE)
#   SHARD_LINES  lines used from each shard, including held-out ones; 0 means all (0; 20000 with SLICE)
#   MIN_COUNT    words that occur less often become unknown; 3 gives the benchmark's own vocabulary of 793,471 (3)
#   LM1B_MIRROR  address of a folder with the archive (https://www.statmt.org/lm-benchmark); may be file:///...
#   LM1B_SHA256  digest of the archive (the public one)
#   WORK         output folder (recipes/lm1b/work/full, or work/slice with SLICE)
#   ARCHIVE_DIR  folder for the archive (recipes/lm1b/work)
#   THREADS      processes for counting and binarising (2)
# test is news.en.heldout-00000-of-00050, on which perplexity is usually reported; valid is the next shard.
set -euo pipefail
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"
HERE=$REPOSITORY/recipes/lm1b
manual_if_asked "${1:-}"

SLICE=${SLICE:-0}
require_choice SLICE 0 1
if [[ $SLICE == 1 ]]; then
  SHARDS=${SHARDS:-1}
  SHARD_LINES=${SHARD_LINES:-20000}
  WORK=${WORK:-$HERE/work/slice}
fi
SHARDS=${SHARDS:-99}
SHARD_LINES=${SHARD_LINES:-0}
MIN_COUNT=${MIN_COUNT:-3}
LM1B_MIRROR=${LM1B_MIRROR:-}
LM1B_SHA256=${LM1B_SHA256:-}
WORK=${WORK:-$HERE/work/full}
ARCHIVE_DIR=${ARCHIVE_DIR:-$HERE/work}
THREADS=${THREADS:-2}
# This is the number of words in the whole text's vocabulary, plus <S>, </S> and <UNK>.
BENCHMARK_VOCABULARY=793471

fetch_texts() {
  python "$HERE/fetch.py" --folder "$ARCHIVE_DIR" --target "$WORK/text" --shards "$SHARDS" --lines "$SHARD_LINES" \
    ${LM1B_MIRROR:+--address "$LM1B_MIRROR"} ${LM1B_SHA256:+--sha256 "$LM1B_SHA256"}
}

# is_whole: succeed if all training text of the public archive is used; the counts must then equal the published ones.
is_whole() { ((SHARDS == 99 && SHARD_LINES == 0)) && [[ -z $LM1B_SHA256 ]]; }

count_texts() {
  local published=()
  if is_whole; then published=(--published); fi
  python "$HERE/counts.py" --text "$WORK/text" "${published[@]}"
}

binarise() { # the dictionary is sorted by falling frequency, as --sampled-softmax requires
  rm -rf "$WORK/data-bin"
  logged "$WORK/preprocess.log" fairseq-preprocess --user-dir "$REPOSITORY/nmt_moe" --only-source --trainpref "$WORK/text/train" \
    --validpref "$WORK/text/valid" --testpref "$WORK/text/test" --thresholdsrc "$MIN_COUNT" --padding-factor 1 \
    --destdir "$WORK/data-bin" --workers "$THREADS"
}

check_tokens() { # perplexity is computed over the counted words, so fairseq must have split the text into the same words
  local part sentences words expected found
  while read -r part sentences words; do
    expected="$sentences sents, $((words + sentences)) tokens"
    found=$(sed -n "s|.*/text/$part: \([0-9]* sents, [0-9]* tokens\).*|\1|p" "$WORK/preprocess.log")
    [[ $found == "$expected" ]] ||
      die "fairseq-preprocess must find '$expected' in $part, including end marks, as in its text, but found '$found':" \
        "remove $WORK and prepare again; log: $WORK/preprocess.log"
  done <"$WORK/text/counts.tsv"
}

check_vocabulary() {
  local words
  words=$(wc -l <"$WORK/data-bin/dict.txt")
  say "vocabulary: $words words with a count of at least $MIN_COUNT, plus <S>, </S> and <UNK>: $((words + 3))"
  if is_whole && ((MIN_COUNT == 3)); then
    # Allow a difference of 3, because it is not documented whether the marks are counted.
    ((words <= BENCHMARK_VOCABULARY && words + 3 >= BENCHMARK_VOCABULARY)) ||
      die "the vocabulary must be the benchmark's, $BENCHMARK_VOCABULARY with the marks, but has $((words + 3)): remove
  $WORK and prepare again"
  fi
}

(($# == 0)) || die "prepare.sh takes no arguments except --help, but was given '$1'"
check_settings
use_environment
key=$(step_key "" fetch "$SHARDS $SHARD_LINES $LM1B_MIRROR $LM1B_SHA256")
run_step "$WORK" fetch "$key" fetch_texts
key=$(step_key "$key" count "")
run_step "$WORK" count "$key" count_texts
key=$(step_key "$key" binarise "$MIN_COUNT")
run_step "$WORK" binarise "$key" binarise
key=$(step_key "$key" tokens "")
run_step "$WORK" tokens "$key" check_tokens
key=$(step_key "$key" vocabulary "")
run_step "$WORK" vocabulary "$key" check_vocabulary
# train.sh resumes training only on the text that the model was trained on.
printf '%s' "$key" >"$WORK/prepared"
