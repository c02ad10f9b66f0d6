# What prepare.sh, train.sh and evaluate.sh agree on; sourced by them after common.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034

# Variables that both the text and the model depend on. WORK names everything of one language and one form of the text.
CASE=${CASE:-source-lower}
require_choice CASE cased source-lower lower

# parse_pairs ARGUMENTS...: the leading arguments that are no flags into PAIRS (default: both), the rest into FLAGS.
parse_pairs() {
  PAIRS=()
  while (($#)) && [[ $1 != -* ]]; do
    [[ $1 == de || $1 == fr ]] || die "PAIR must be de or fr, but is '$1'"
    PAIRS+=("$1")
    shift
  done
  ((${#PAIRS[@]})) || PAIRS=(de fr)
  FLAGS=("$@")
  if [[ -n ${WORK:-} && ${#PAIRS[@]} -gt 1 ]]; then
    die "WORK holds one language: name the PAIR, de or fr"
  fi
}

# work_folder PAIR: where this pair's texts and models are.
work_folder() {
  local suffix=""
  [[ $CASE == cased ]] || suffix=-$CASE
  printf '%s' "${WORK:-$REPOSITORY/recipes/multi30k/work/$1$suffix}"
}
