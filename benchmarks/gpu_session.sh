#!/usr/bin/env bash
# Check and time all kernels on a GPU, in parts of less than ten minutes: gpu_session.sh OUT [--dry-run] [PART...]
#
# The script tries and checks all kernels before it times any. It stops at the first wrong result; if it is run
# again, it resumes there. To repeat a part, delete OUT/NN-PART.md. Each part writes its table to OUT/NN-PART.md, and
# OUT/summary.md contains all tables. The script needs torch with CUDA and Triton. The parts `train-step` and `training` also
# need fairseq, and memcheck, racecheck and initcheck need CUDA's compute-sanitizer. A part says so if it lacks what it needs.
#   --dry-run   use tiny sizes and Triton's interpreter, without a GPU, to show that the programs work
#   PART...     run only these parts: machine memcheck racecheck initcheck rows gating adam layer train-step training
#               products kernels sweep-products sweep-adam layers-1 to layers-9 profile
# NMT_MOE_PYTHON names the Python to use (python).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
PYTHON=${NMT_MOE_PYTHON:-python}
LIMIT=600 # seconds for each part
PARTS=(machine memcheck racecheck initcheck rows gating adam layer train-step training products kernels sweep-products sweep-adam
  layers-{1..9} profile)
OURS='_(gather|sum|combine_backward|multiply|weight_gradient|zero|square_sums|column_means|update)_kernel|^(forward|select|sum|noise|backward)_kernel'

manual() { sed -n '2,/^set/p' "${BASH_SOURCE[0]}" | sed '$d; s/^# \{0,1\}//'; }

out='' dry=() chosen=()
for word; do
  case $word in
    -h | --help) manual; exit ;;
    --dry-run) dry=(--dry-run) ;;
    -*) echo "unknown option $word; --help lists all options" >&2; exit 2 ;;
    *) if [[ -z $out ]]; then out=$word; else chosen+=("$word"); fi ;;
  esac
done
[[ -n $out ]] || { manual >&2; exit 2; }
for part in "${chosen[@]}"; do
  [[ " ${PARTS[*]} " == *" $part "* ]] || { echo "there is no part $part; --help lists all parts" >&2; exit 2; }
done
mkdir -p "$out"
out=$(cd "$out" && pwd)

program() { timeout "$LIMIT" "$PYTHON" -m benchmarks.gpu_session "$1" --out "$out" "${dry[@]}"; }

# PYTORCH_NO_CUDA_MEMORY_CACHING is set because the sanitizer would miss accesses beyond a tensor in torch's cached memory.
sanitizer() {
  if ((${#dry[@]})) || ! command -v compute-sanitizer >/dev/null; then
    echo "not run: compute-sanitizer, a part of CUDA's toolkit, is missing"
    return
  fi
  local tool=$1 part filter=()
  # torch's own kernels read uninitialised memory, but do not use its values.
  [[ $tool != initcheck ]] || filter=(--kernel-regex "kns=$OURS")
  for part in rows gating adam; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout "$((LIMIT / 3))" compute-sanitizer --tool "$tool" --error-exitcode 1 \
      "${filter[@]}" "$PYTHON" -m benchmarks.gpu_session "$part" --tiny --out "$out" >"$out/$tool-$part.log" ||
      { tail -40 "$out/$tool-$part.log" >&2; return 1; }
    echo "- $part: nothing found"
  done
}

with_fairseq() {
  if ((${#dry[@]})); then
    echo "not run: a dry run does not train"
  elif ! "$PYTHON" -c "import fairseq" 2>/dev/null; then
    echo "not run: fairseq is not installed"
  else
    timeout "$LIMIT" "$@"
  fi
}

train_step() {
  with_fairseq "$PYTHON" -m benchmarks.train_step --device cuda --no-memory --rounds 5 \
    --arch lstm_moe_gnmt_small lstm_gnmt_small
}

training() {
  NMT_MOE_PYTHON=$PYTHON with_fairseq bash recipes/demo/run.sh --device cuda --updates 600 --work "$out/training" |
    sed 's/^/    /'
}

layers() {
  if ((${#dry[@]})) && (($1 > 1)); then
    echo "not run: in a dry run this part would do the same as layers-1"
    return
  fi
  local options=(--grid gpu --only "$1" --device cuda --rounds 5)
  ((${#dry[@]} == 0)) || options=(--shape '32,16,16,4,2' --modes forward --rounds 1 --threads 1)
  timeout "$LIMIT" "$PYTHON" -m benchmarks.moe_layer "${options[@]}" --json "$out/layers-$1.json"
}

run() {
  case $1 in
    memcheck | racecheck | initcheck) sanitizer "$1" ;;
    train-step) train_step ;;
    training) training ;;
    layers-*) layers "${1#layers-}" ;;
    *) program "$1" ;;
  esac
}

summarise() {
  local part
  for part in "$out"/[0-9][0-9]-*.md; do
    [[ ! -e $part ]] || { printf '## %s\n\n' "$(basename "$part" .md)"; cat "$part"; echo; }
  done >"$out/summary.md"
}

for index in "${!PARTS[@]}"; do
  part=${PARTS[index]}
  ((${#chosen[@]} == 0)) || [[ " ${chosen[*]} " == *" $part "* ]] || continue
  name=$(printf '%02d-%s' "$((index + 1))" "$part")
  if [[ -e $out/$name.md ]]; then
    echo "$name: already done"
    continue
  fi
  echo "$name ..."
  start=$SECONDS
  if ! run "$part" >"$out/$name.failed" 2>"$out/$name.log"; then
    summarise
    tail -5 "$out/$name.failed" >&2
    tail -20 "$out/$name.log" >&2
    echo "$name failed: see $out/$name.failed and $out/$name.log" >&2
    exit 1
  fi
  mv "$out/$name.failed" "$out/$name.md"
  echo "$name: $((SECONDS - start)) s"
done
summarise
echo "all tables: $out/summary.md"
