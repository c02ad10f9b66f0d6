# Settings that prepare.sh, train.sh and evaluate.sh share; they source this file after common.sh.
# shellcheck shell=bash
# shellcheck disable=SC2034

# Variables on which both the text and the model depend. WORK is the folder for one language and one form of the text.
CASE=${CASE:-source-lower}
require_choice CASE cased source-lower lower

# parse_pairs ARGUMENTS...: put leading arguments that are not flags into PAIRS (default: both), and the rest into FLAGS.
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
    die "WORK is for one language: name the PAIR, de or fr"
  fi
}

# work_folder PAIR: print the folder with this pair's texts and models.
work_folder() {
  local suffix=""
  [[ $CASE == cased ]] || suffix=-$CASE
  printf '%s' "${WORK:-$REPOSITORY/recipes/multi30k/work/$1$suffix}"
}

# lower_case: copy standard input to standard output in lower case.
lower_case() { python -c 'import sys; sys.stdout.writelines(line.lower() for line in sys.stdin)'; }
