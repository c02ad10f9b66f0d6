# Settings that prepare.sh, train.sh and evaluate.sh share; they source this after common.sh, with the pair as argument.
# shellcheck shell=bash
# shellcheck disable=SC2034,SC2329

HERE=$REPOSITORY/recipes/wmt14
PAIR=${1:-}
[[ $PAIR == de || $PAIR == fr ]] || die "call recipes/wmt14_en_fr/ or recipes/wmt14_en_de/: PAIR is '$PAIR'"
RECIPE=$REPOSITORY/recipes/wmt14_en_$PAIR
WORK=${WORK:-$RECIPE/work}
DEVICE=${DEVICE:-auto}

# take_dry_run ARGUMENTS...: turn --dry-run into DRY_RUN, and put the others into FLAGS.
take_dry_run() {
  local argument
  DRY_RUN=0
  FLAGS=()
  for argument; do
    if [[ $argument == --dry-run ]]; then DRY_RUN=1; else FLAGS+=("$argument"); fi
  done
}

# use_environment_unless_dry: create the environment, except in a dry run, which only needs python3.
use_environment_unless_dry() {
  if [[ $DRY_RUN == 0 ]]; then
    use_environment
  elif [[ -n ${NMT_MOE_PYTHON:-} ]]; then
    python() { "$NMT_MOE_PYTHON" "$@"; }
  elif ! command -v python >/dev/null; then
    python() { python3 "$@"; }
  fi
}
