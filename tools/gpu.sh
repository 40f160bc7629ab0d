#!/bin/bash
# Proves and measures operators on a GPU machine, within eight minutes:  tools/gpu.sh [OP ...]   (make gpu OPS="...")
# Uses the interpreter $PYTHON (python3) with the packages it has: no venv, no network, nothing installed. Results are
# bench/results/<gpu>/*.json and triton_ops/tuned/<gpu>/*.json. A step that fails does not stop the later ones, but the
# exit status is then 1.
set -u
cd "$(dirname "$0")/.."
python=${PYTHON:-python3}
ops=("$@")
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
deadline=$((SECONDS + 470))
failed=()

die() {
  echo "make gpu: $*" >&2
  exit 2
}

# step NAME SECONDS COMMAND...: runs it within its share of the time and remembers how it went.
step() {
  local name=$1 limit=$2 left=$((deadline - SECONDS)) begun=$SECONDS status=0
  shift 2
  ((left < limit)) && limit=$left
  echo "=== $name (at most ${limit} s)"
  if ((limit < 5)); then
    status='no time left'
  else
    timeout --kill-after=10 "$limit" "$@" || status="exit status $?"
  fi
  [ "$status" = 0 ] || failed+=("$name: $status")
  echo "=== $name: $([ "$status" = 0 ] && echo ok || echo "FAILED, $status"), $((SECONDS - begun)) s"
}

# The compiled operators, unless they are there already: they move between machines (stable ABI).
build_operators() {
  compgen -G 'pyops/_C*.so' >/dev/null || "$python" setup.py build_ext --inplace
}

# _host is bound to one Python version, so it may be missing beside operators built elsewhere. It goes into the
# temporary package: building it by setup.py would also replace the operators.
build_host() {
  local suffix
  suffix=$("$python" -c 'import sysconfig; print(sysconfig.get_config_var("EXT_SUFFIX"))')
  [ -e "pyops/_host$suffix" ] && return
  "$python" -c 'import pybind11' 2>/dev/null || { echo 'pybind11 is not installed: no fastops._host'; return 0; }
  cmake -S . -B "$work/host" -G Ninja -DFASTOPS_CUDA=OFF -DPython_EXECUTABLE="$(command -v "$python")" \
    -DTORCH_DIR="$("$python" -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("torch").origin))')" &&
    cmake --build "$work/host" --target _host && cp "$work"/host/_host*.so "$work/path/fastops/"
}

"$python" -c 'import torch' 2>/dev/null || die "$python has no torch; choose another with PYTHON=..."
"$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())' || die 'torch sees no CUDA device here'
for package in typer rich pytest; do
  "$python" -c "import $package" 2>/dev/null || die "$python has no $package, which the steps below need"
done

step 'build operators' 300 bash -c "python='$python'; $(declare -f build_operators); build_operators"
tools/shim.sh "$work/path"
export PYTHONPATH="$work/path${PYTHONPATH:+:$PYTHONPATH}"
step 'build host objects' 60 bash -c "python='$python' work='$work'; $(declare -f build_host); build_host"
"$python" -m fastops info

names=$(printf ' or %s' "${ops[@]}")
step 'tests' 180 env PYTHONSAFEPATH=1 "$python" -m pytest tests -m 'gpu or multi_gpu' -q ${ops[@]:+-k "${names# or }"}
step 'verify' 60 "$python" -m fastops verify "${ops[@]}"
if command -v compute-sanitizer >/dev/null; then
  # Every tensor its own allocation, so that a step beyond its end is seen.
  PYTORCH_NO_CUDA_MEMORY_CACHING=1 step 'memcheck' 90 compute-sanitizer --tool memcheck --error-exitcode 1 \
    "$python" -m fastops verify --device cuda "${ops[@]}"
  step 'racecheck' 90 compute-sanitizer --tool racecheck --error-exitcode 1 \
    "$python" -m fastops verify --device cuda "${ops[@]}"
else
  failed+=('compute-sanitizer is not on PATH')
fi
step 'tune' 150 "$python" -m fastops tune --ship "${ops[@]}"
step 'bench' 200 "$python" -m fastops bench "${ops[@]}"

if [ ${#failed[@]} -gt 0 ]; then
  printf 'make gpu: FAILED %s\n' "${failed[@]}" >&2
  exit 1
fi
echo "make gpu: everything passed, $SECONDS s"
