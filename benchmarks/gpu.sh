#!/usr/bin/env bash
# Everything that needs an NVIDIA GPU, in slices, for a machine that is lent for half an hour and has no network.
#
#   benchmarks/gpu.sh list                    the slices: commands of at most ten minutes, seconds, what each is for
#   benchmarks/gpu.sh pack FOLDER [LIST]      fetch the wheels that such a machine lacks; needs a network and no GPU
#   benchmarks/gpu.sh rehearse [SLICE...]     the same on this processor, with small sizes: no result of anything
#   benchmarks/gpu.sh [OPTIONS] SLICE...      run slices; first, second and third are the commands of one loan, in
#                                             order: correctness first; more is what a longer one can add
#
#   --wheels FOLDER   install the wheels in that folder first; nothing is downloaded
#   --archive FILE    keep all results in one file too, from slice to slice; where it is there, go on from it
#   --again           run slices that are done, and measure rows that are there
#
# A slice that is done is skipped, one that was killed goes on with the rows that it lacks. Results go to $OUT, by
# default benchmarks/results/<device>. PYTHON chooses the interpreter (default python3): it must hold torch with CUDA.
set -euo pipefail
cd "$(dirname "$0")/.."
PYTHON=${PYTHON:-python3}

# command, slice, seconds that it may take, what for; those to install are reckoned for each command, and the loan's for
# a machine to start as well
INSTALL=75
START=120
LOAN=1800
TABLE='
first  doctor          30 what the machine has, and what will run on it
first  tests          130 the tests that need a GPU, both kinds of kernels among them
first  memcheck       100 reads and writes past the end of a tensor, in every kernel
first  racecheck      140 threads of a block that meet without a barrier, in every kernel
first  compiled        85 registers, spills and access widths, as compiled there
second norm           140 group_norm beside its rivals, Triton and CUDA
second attention       60 cross_attention beside its rivals
second sample         260 whole runs of `small`, every engine raced
third  train          250 training steps of `small`, from a plain loop to the trainer
third  nccl            75 one process under torchrun with NCCL: DDP, then the same run under FSDP
third  export          80 a bundle in bf16, checked against the network, and pictures of it by every engine
third  build          100 engines of that bundle, each checked, and pictures by it
more   maps           400 attention_moments and attention_columns beside their rivals
more   sample-base    590 whole runs of `base`, every engine raced
more   train-base     590 training steps of `base`
more   ladder-base    590 sampling of `base`, each optimisation in turn
more   tune-norm-1    590 launch tables for this card, beside the results: copy them over kernels/*/ladder.json
more   tune-norm-2    590 as tune-norm-1
more   tune-norm-3    590 as tune-norm-1
more   tune-attention 590 as tune-norm-1
more   tune-moments   590 as tune-norm-1
more   tune-columns   590 as tune-norm-1
'
usage() { sed -n '2,/^set/{/^set/d;s/^# \{0,1\}//;p}' "$0"; }
complain() { echo "gpu.sh: $1" >&2; exit 2; }
slices_of() { awk -v want="$1" '$1 == want { print $2 }' <<< "$TABLE"; }
seconds_of() { awk -v want="$1" '$2 == want { print $3 }' <<< "$TABLE"; }

list() {
  local command sum=$START
  for command in first second third more; do
    local total=$INSTALL slice
    while read -r slice; do total=$((total + $(seconds_of "$slice"))); done < <(slices_of "$command")
    if [[ $command == more ]]; then
      echo more
    else
      echo "$command: $total s, $INSTALL of them to install"
      sum=$((sum + total))
    fi
    while read -r slice; do
      awk -v want="$slice" '
        $2 == want { cost = $3; $1 = $2 = $3 = ""; printf "  %-15s %4d s %s\n", want, cost, substr($0, 3) }
      ' <<< "$TABLE"
    done < <(slices_of "$command")
  done
  echo "first to third with $START s for a machine to start: $sum of $LOAN s"
}

again=""; rehearsal=0; WHEELS=""; ARCHIVE=""; one=""
case ${1:-} in
  "" | -h | --help) usage; exit 0 ;;
  list) list; exit 0 ;;
  pack) shift; exec "$PYTHON" -P -m semantica.benchmarks.pack "$@" ;;
  rehearse) rehearsal=1; shift; [[ $# -gt 0 ]] || set -- first second third ;;
esac
while [[ ${1:-} == --* ]]; do
  case $1 in
    --again) again=1; shift ;;
    --one) one=1; shift ;;
    --wheels) WHEELS=${2:?}; shift 2 ;;
    --archive) ARCHIVE=${2:?}; shift 2 ;;
    *) complain "unknown option $1: see --help" ;;
  esac
done
chosen=()
for name in "$@"; do
  case $name in
    first | second | third | more) mapfile -t -O ${#chosen[@]} chosen < <(slices_of "$name") ;;
    *)
      [[ -n $(seconds_of "$name") ]] || complain "unknown slice '$name': see benchmarks/gpu.sh list"
      chosen+=("$name") ;;
  esac
done
[[ ${#chosen[@]} -gt 0 ]] || complain "no slice was named: see benchmarks/gpu.sh list"
[[ -z $WHEELS ]] || compgen -G "$WHEELS/*.whl" > /dev/null || complain "--wheels $WHEELS: there are no wheels in it"

# the one place that knows a card from a processor that stands in for it
card() {
  case $1$( ((rehearsal)) && echo -rehearsed) in
    name) "$PYTHON" -P -c 'import torch; print(torch.cuda.get_device_name().lower().replace(" ", "-"))' 2> /dev/null ;;
    name-rehearsed) echo rehearsal ;;
    arch) "$PYTHON" -P -c 'import torch; print("sm_%d%d" % torch.cuda.get_device_capability())' ;;
    arch-rehearsed) echo sm_90 ;;
    state) nvidia-smi ;;
    state-rehearsed) echo "no card: a rehearsal" ;;
    # libraries ask the driver for functions that it may lack, which is no fault of a kernel; a failed launch raises
    sanitizer) shift; compute-sanitizer --error-exitcode 9 --report-api-errors no "$@" ;;
    sanitizer-rehearsed) shift; while [[ $1 == --* ]]; do shift 2; done; "$@" ;;
  esac
}
if ((rehearsal)); then
  # small sizes, few rounds, and what a processor can do of each
  DEVICE=cpu; QUICK=(--quick); SMALL=tiny; STEPS=2; LEVELS=2; BACKENDS=(inductor);
  COMPILED=(--filter "group_norm forward [8, 48, 16, 16]")
  SAMPLERS=(--only "plain,torch-eager,onnxruntime" --batch 1 --steps 2)
else
  DEVICE=cuda; QUICK=(); SMALL=small; STEPS=20; LEVELS=16; BACKENDS=(inductor tensorrt); COMPILED=()
  SAMPLERS=(--batch 1 8 --steps 20)
fi

device=$(card name) || complain "$PYTHON finds no GPU through torch"
OUT=${OUT:-benchmarks/results/$device}
mkdir -p "$OUT/done"
OUT=$(cd "$OUT" && pwd)
RESUME=(--resume)
[[ -z $again ]] || RESUME=()

semantica() { "$PYTHON" -P -m semantica.cli "$@"; }

# what a suite of semantica bench writes: $1 name of the files, then the verb and its options
bench() {
  local name="$OUT/$1"; shift
  semantica bench "$@" --device $DEVICE ${RESUME[@]+"${RESUME[@]}"} \
    --json "$name.json" --html "$name.html" --png "$name.png" | tee "$name.txt"
}
kernels() { bench "$1" kernels --op "$1" ${QUICK[@]+"${QUICK[@]}"}; }
sampling() { bench "$1" sample --models "$2" --seconds 5 "${@:3}" ${QUICK[@]+"${QUICK[@]}"}; }
training() { bench "$1" train --preset "$2" --batch "$3" --steps $STEPS --workers "$(($(nproc) / 8))"; }
# ladders of one operator's launch table; each slice goes on from what the one before wrote
tuning() {
  local op=$1; shift
  semantica bench tune --op "$op" --kernel "$@" --out "$OUT/tuned/$op.json" | tee -a "$OUT/tune-$op.txt"
}

# tests that need a GPU: $1 name of the files, then options and files
tested() {
  "$PYTHON" -P -m pytest -q -p no:cacheprovider -m gpu --junitxml "$OUT/$1.xml" "${@:2}" | tee "$OUT/$1.txt"
}

# every case of the table by every implementation of ours, forward and backward; each tensor has an allocation of its
# own, so that no overrun hides in a neighbour
checked() {
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 card sanitizer --tool "$1" --log-file "$OUT/$1.txt" "$PYTHON" -P -c '
import sys
from semantica.benchmarks.kernels.exercise import exercise
print(exercise(sys.argv[1]), "calls")' $DEVICE
  [[ ! -e $OUT/$1.txt ]] || tail -n 1 "$OUT/$1.txt"
}

# the same steps in one process under torchrun: DDP, then FSDP, which goes on from the checkpoint
nccl() {
  local place="$OUT/.run" mode
  rm -rf "$place"; mkdir -p "$place"
  "$PYTHON" -P -c '
import pathlib, sys
from semantica.benchmarks.quality.web import draw_web
draw_web(pathlib.Path(sys.argv[1]), groups=8, images_per_group=8)' "$place/web"
  for mode in ddp fsdp; do
    "$PYTHON" -P -m torch.distributed.run --standalone --nproc-per-node 1 --no-python "$PYTHON" -P -m semantica.cli \
      train --data "$place/web/train" --out "$place/run" --preset $SMALL --device $DEVICE --parallel $mode --batch 8 \
      --steps "$((STEPS * (1 + (${#mode} == 4))))" | tee "$OUT/nccl-$mode.txt"
  done
  cp "$place/run/metrics.jsonl" "$OUT/nccl.jsonl"
  rm -rf "$place"
}

# a bundle of the model that is raced, kept for the slice that builds
bundle() {
  [[ -e $OUT/.bundle/manifest.json ]] && return
  rm -rf "$OUT/.model" "$OUT/.bundle"
  "$PYTHON" -P -c '
import pathlib, sys
from semantica.benchmarks.sampling.models import folder_of
folder_of(sys.argv[1], pathlib.Path(sys.argv[2]))' $SMALL "$OUT/.model"
  semantica export --model "$OUT/.model/$SMALL" --out "$OUT/.bundle" --precision "$1" --levels $LEVELS --steps $STEPS
}
# whether an engine can be asked for here; what it lacks is written down, since the slice goes on without it
able() {
  local lacks
  lacks=$("$PYTHON" -P -c '
import sys
from semantica.engines import BACKENDS
name, device = sys.argv[1:]
lacks = BACKENDS[name].why_not()
if not lacks and (name, device) == ("onnxruntime", "cuda"):
    import onnxruntime
    there = "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    lacks = "" if there else "this ONNX Runtime has no CUDA"
print(lacks)' "$1" "$DEVICE")
  [[ -z $lacks ]] || { echo "left out: $1 ($lacks)" | tee -a "$OUT/left-out.txt"; return 1; }
}
pictures() {
  local device=$DEVICE
  # its engines are for processors alone
  [[ $1 != inductor ]] || device=cpu
  [[ -e $OUT/picture.png ]] || "$PYTHON" -P -c '
import sys
import numpy, PIL.Image
pixels = numpy.random.default_rng(0).integers(0, 256, (4, 4, 3), dtype=numpy.uint8).repeat(64, 0).repeat(64, 1)
PIL.Image.fromarray(pixels).save(sys.argv[1])' "$OUT/picture.png"
  semantica sample --model "$OUT/.bundle" --image "$OUT/picture.png" --out "$OUT/pictures-$1.png" --engine "$1" \
    --device $device -n 2 --steps $STEPS
}

run() {
  case $1 in
    doctor) card state | tee "$OUT/card.txt"; semantica doctor | tee "$OUT/doctor.txt" ;;
    tests)
      local files timed several=() code=0
      # what is timed wants the card for itself
      mapfile -t timed < <(grep -l 'timing\.CudaClock()' $(grep -l 'mark\.gpu' tests/*.py))
      mapfile -t files < <(grep -l 'mark\.gpu' tests/*.py | grep -vxF "$(printf '%s\n' "${timed[@]}")")
      # most of the others' time is compiling, which every core can do
      if "$PYTHON" -P -c 'import xdist' 2> /dev/null; then several=(-n 8); fi
      tested tests ${several[@]+"${several[@]}"} "${files[@]}" || code=$?
      tested tests-timed "${timed[@]}" || code=$?
      return $code ;;
    memcheck | racecheck) checked "$1" ;;
    compiled)
      semantica bench kernels --compile-only --arch "$(card arch)" --workers "$(nproc)" \
        ${COMPILED[@]+"${COMPILED[@]}"} --json "$OUT/compiled.json" --html "$OUT/compiled.html" \
        | tee "$OUT/compiled.txt" ;;
    norm) kernels group_norm ;;
    attention) kernels cross_attention ;;
    maps)
      # one that is wrong costs the other nothing
      local op code=0
      for op in attention_moments attention_columns; do kernels $op || code=$?; done
      return $code ;;
    sample) sampling sample-$SMALL $SMALL "${SAMPLERS[@]}" ;;
    sample-base) sampling sample-base base "${SAMPLERS[@]}" ;;
    ladder-base) sampling ladder-base base --ladder --batch 1 --steps 20 ;;
    train) training train-$SMALL $SMALL "$([[ $DEVICE == cuda ]] && echo 64 || echo 2)" ;;
    train-base) training train-base base 16 ;;
    nccl) nccl ;;
    export)
      bundle "$([[ $DEVICE == cuda ]] && echo bf16 || echo fp32)"
      # one that fails has not stopped the next, and is no success
      local engine code=0
      for engine in torch torch-compile onnxruntime; do
        if able $engine; then pictures $engine || code=$?; fi
      done
      return $code ;;
    build)
      bundle "$([[ $DEVICE == cuda ]] && echo bf16 || echo fp32)"
      local backend code=0
      for backend in "${BACKENDS[@]}"; do
        able $backend || continue
        # one that is there was checked when it was built
        compgen -G "$OUT/.bundle/engines/$backend-*" > /dev/null \
          || semantica build "$OUT/.bundle" --backend $backend || { code=$?; continue; }
        pictures $backend || code=$?
      done
      return $code ;;
    tune-norm-1) tuning group_norm resident resident_backward merge merge_backward ;;
    tune-norm-2) tuning group_norm partial apply ;;
    tune-norm-3) tuning group_norm partial_backward apply_backward ;;
    tune-attention) tuning cross_attention forward dq dkv ;;
    tune-moments) tuning attention_moments forward dq dk df ;;
    tune-columns) tuning attention_columns forward dq dk ;;
  esac
}

# a slice by itself, in a process that can be ended when its time is over
if [[ -n $one ]]; then run "${chosen[0]}"; exit; fi

# csrc and the packages that the image lacks: once on each machine
prepare() {
  local pip=("$PYTHON" -m pip install --quiet --disable-pip-version-check --no-index --no-deps) stamp
  stamp=$(cat setup.py csrc/*.* csrc/cuda/* pyproject.toml semantica/nvcc.py | cksum)
  [[ "$("$PYTHON" -P -c 'import semantica, sys; print(sys.prefix, semantica.__path__[0])' 2> /dev/null) $stamp" != \
    "$(cat "$OUT/.installed" 2> /dev/null)" ]] || return 0
  if [[ -n $WHEELS ]]; then "${pip[@]}" "$WHEELS"/*.whl; fi
  "${pip[@]}" --no-build-isolation -e .
  echo "$("$PYTHON" -P -c 'import semantica, sys; print(sys.prefix, semantica.__path__[0])') $stamp" > "$OUT/.installed"
}

# what can be made again, and what is true of this machine alone, is left out
keep() {
  local left=(--exclude .installed --exclude .model --exclude .run --exclude .bundle)
  [[ -n $ARCHIVE ]] || return 0
  # who is ended here must not leave half a file in the place of a whole one
  tar -czf "$ARCHIVE.new" -C "$OUT" "${left[@]}" .
  mv "$ARCHIVE.new" "$ARCHIVE"
}

if [[ -n $ARCHIVE && -e $ARCHIVE ]]; then
  # what was measured here since it was packed stays
  tar -xzf "$ARCHIVE" --keep-newer-files --warning=no-ignore-newer -C "$OUT"
fi
if ! ((rehearsal)); then prepare; fi
failed=()
for slice in "${chosen[@]}"; do
  if [[ -z $again && -e $OUT/done/$slice ]]; then
    echo "== $slice: done before ($(cat "$OUT/done/$slice"))"
    continue
  fi
  rm -f "$OUT/done/$slice"
  echo "== $slice"
  began=$SECONDS limit=$(($(seconds_of "$slice") * (rehearsal ? 4 : 1))) options=() code=0
  if ((rehearsal)); then options+=(rehearse); fi
  if [[ -n $again ]]; then options+=(--again); fi
  # what is complete is written as it comes, so that ending it costs little; one that fails costs no other its results
  OUT=$OUT timeout --kill-after=15 "$limit" \
    bash "$PWD/benchmarks/gpu.sh" ${options[@]+"${options[@]}"} --one "$slice" || code=$?
  said="$((SECONDS - began)) of $limit s"
  case $code in
    0) echo "$said" > "$OUT/done/$slice" ;;
    124 | 137) said+=", out of time: what is complete is kept, the rest next time"; failed+=("$slice") ;;
    *) said+=", exit code $code"; failed+=("$slice") ;;
  esac
  echo "== $slice: $said"
  keep
done
if [[ ${#failed[@]} -gt 0 ]]; then
  echo "gpu.sh: not done: ${failed[*]}" >&2
  exit 1
fi
