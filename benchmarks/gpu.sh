#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in slices that each end within ten minutes on a data-centre card.
#
#   benchmarks/gpu.sh list                 print the slices
#   benchmarks/gpu.sh SLICE... | all       run them; results go to $OUT, by default benchmarks/results/<device>
#   WHEELS=folder benchmarks/gpu.sh ...    install the wheels in that folder first; nothing is downloaded
#
# PYTHON chooses the interpreter (default python3). It must hold torch with CUDA, and setuptools and pybind11 to build.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}
SLICES=(doctor tests sanitize compiled tune-norm-1 tune-norm-2 tune-norm-3 tune-attention norm-1 norm-2 norm-3 norm-4
        attention-1 attention-2 train-small train-base sample-small sample-base ladder-base)

usage() { sed -n '2,8s/^# \{0,1\}//p' "$0"; }

if [[ $# -eq 0 || $1 == -h || $1 == --help ]]; then usage; exit 0; fi
if [[ $1 == list ]]; then printf '%s\n' "${SLICES[@]}"; exit 0; fi
# tuning changes what is measured after it, so it is asked for by name
if [[ $1 == all ]]; then
  set --
  for slice in "${SLICES[@]}"; do if [[ $slice != tune-* ]]; then set -- "$@" "$slice"; fi; done
fi
for slice in "$@"; do
  if [[ " ${SLICES[*]} " != *" $slice "* ]]; then
    echo "gpu.sh: unknown slice '$slice': choose some of ${SLICES[*]}" >&2; exit 2
  fi
done

device=$("$PYTHON" -P -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))' 2> /dev/null) || {
  echo "gpu.sh: $PYTHON finds no GPU through torch" >&2; exit 2
}
OUT=${OUT:-benchmarks/results/$device}
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)

# builds csrc too; the packages that torch's image lacks come from WHEELS
prepare() {
  local pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps)
  if [[ -n ${WHEELS:-} ]]; then "${pip[@]}" "$WHEELS"/*.whl; fi
  "${pip[@]}" --no-build-isolation -e .
}

semantica() { "$PYTHON" -P -m semantica.cli "$@"; }

# rows of one operator, a part of its problems at a time: $1 operator, $2 part
kernels() {
  local name="$OUT/$1-${2%/*}"
  semantica bench kernels --op "$1" --device cuda --part "$2" \
    --json "$name.json" --html "$name.html" --png "$name.png" | tee "$name.txt"
}

# ladders of one operator's launch table: $1 operator, then ladders; each slice goes on from what the one before wrote
tuning() {
  local op=$1; shift
  semantica bench tune --op "$op" --kernel "$@" --out "$OUT/tuned/$op.json" | tee -a "$OUT/tune-$op.txt"
}

# training steps, from a plain loop to the trainer: $1 preset, $2 batch
training() {
  local name="$OUT/train-$1"
  semantica bench train --preset "$1" --batch "$2" --device cuda --workers "$(($(nproc) / 8 + 1))" \
    --json "$name.json" --html "$name.html" --png "$name.png" | tee "$name.txt"
}

# whole sampling runs: $1 name of the files, then options of semantica bench sample
sampling() {
  local name="$OUT/$1"; shift
  semantica bench sample --device cuda --seconds 5 "$@" \
    --json "$name.json" --html "$name.html" --png "$name.png" | tee "$name.txt"
}

# every case of the table, forward and backward, each tensor in an allocation of its own so that no overrun hides
sanitize() {
  if ! command -v compute-sanitizer > /dev/null; then
    echo "gpu.sh: compute-sanitizer is not on the path" >&2; return 1
  fi
  local program='
import torch
from semantica.benchmarks.kernels.verify import evaluate
from semantica.kernels import OPERATORS
from semantica.kernels.group_norm.cases import GroupNormCase
# beyond one tile: statistics in chunks, merged by the apply pass, and by a launch of their own
split = [
    GroupNormCase(shape, groups, channels_last=last)
    for shape, groups in (((1, 64, 128, 128), 8), ((2, 30, 67, 129), 3), ((1, 8, 256, 256), 1))
    for last in (False, True)
]
for name, operator in OPERATORS.items():
    for case in [*operator.cases.values(), *(split if name == "group_norm" else [])]:
        inputs = case.inputs(torch.bfloat16, "cuda")
        evaluate(operator.function, inputs, torch.ones_like(operator.output(case, torch.bfloat16), device="cuda"))
torch.cuda.synchronize()'
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 timeout 280 compute-sanitizer --tool "$tool" --error-exitcode 9 \
      --log-file "$OUT/$tool.txt" "$PYTHON" -P -c "$program"
    tail -n 1 "$OUT/$tool.txt"
  done
}

run() {
  case $1 in
    doctor) nvidia-smi | tee "$OUT/nvidia-smi.txt"; semantica doctor | tee "$OUT/doctor.txt" ;;
    tests) "$PYTHON" -P -m pytest -q -m gpu --junitxml "$OUT/tests.xml" ;;
    sanitize) sanitize ;;
    compiled)
      local arch
      arch=$("$PYTHON" -P -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())')
      semantica bench kernels --compile-only --arch "$arch" --workers "$(nproc)" \
        --json "$OUT/compiled.json" --html "$OUT/compiled.html" | tee "$OUT/compiled.txt" ;;
    # launch tables for this device, beside the results: copy them over kernels/*.json to ship them
    tune-norm-1) tuning group_norm resident resident_backward merge merge_backward ;;
    tune-norm-2) tuning group_norm partial apply ;;
    tune-norm-3) tuning group_norm partial_backward apply_backward ;;
    tune-attention) tuning cross_attention forward dq dkv ;;
    norm-*) kernels group_norm "${1#norm-}/4" ;;
    attention-*) kernels cross_attention "${1#attention-}/2" ;;
    train-small) training small 64 ;;
    train-base) training base 16 ;;
    sample-small) sampling sample-small --models small ;;
    sample-base) sampling sample-base --models base --steps 20 ;;
    ladder-base) sampling ladder-base --models base --steps 20 --batch 1 --ladder ;;
  esac
}

prepare
failed=()
for slice in "$@"; do
  echo "== $slice"
  began=$SECONDS
  # a slice that fails must not cost the results of the others; a subshell of its own keeps set -e in force
  set +e
  (set -e; run "$slice")
  code=$?
  set -e
  if [[ $code -ne 0 ]]; then failed+=("$slice"); fi
  echo "== $slice: $((SECONDS - began)) s, exit code $code"
done
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "gpu.sh: failed: ${failed[*]}" >&2
  exit 1
fi
