#!/bin/sh
# Builds the source distribution and, from it, the wheels, and runs the suite against each wheel, installed where
# nothing else of fastops is:  tools/test_wheels.sh VENV
# VENV has torch and the test packages; each clean environment borrows them through a .pth file, which leaves VENV's own
# editable install of fastops behind.
set -eu
venv=$(cd "$1" && pwd)
root=$(cd "$(dirname "$0")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export PATH="$venv/bin:$PATH"
borrowed=$(python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')

# clean NAME WHEEL: an environment that holds the wheel.
clean() {
  python -m venv --without-pip "$work/$1"
  python -m pip --disable-pip-version-check --python "$work/$1/bin/python" install --quiet --no-deps --no-index "$2"
  echo "$borrowed" >"$("$work/$1/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/borrowed.pth"
}

# The wheels are built from what is packed, so a file that MANIFEST.in forgets is missed here. Another egg-base than the
# checkout: the list of files that an old build left there would be packed too.
cd "$root"
mkdir "$work/egg"
FASTOPS_PURE=1 python setup.py --quiet egg_info --egg-base "$work/egg" sdist --dist-dir "$work"
tar -xzf "$work"/fastops-*.tar.gz -C "$work"
source=$(echo "$work"/fastops-*/)
cd "$source"

wheel() {
  rm -rf build/lib* build/bdist*
  python -m pip wheel --disable-pip-version-check --quiet --no-build-isolation --no-deps -w "$1" .
}

FASTOPS_PURE=1 wheel "$work/pure-wheel"
clean pure "$work"/pure-wheel/*-none-any.whl
"$work/pure/bin/python" - <<'PY'
import fastops
assert fastops._extension.C is None, "the pure wheel must hold no extension"
assert "site-packages" in fastops.__file__, fastops.__file__
PY
PYTHONSAFEPATH=1 "$work/pure/bin/python" -m pytest tests -q -m 'not slow'

FASTOPS_HOST=0 wheel "$work/full-wheel"
clean full "$work"/full-wheel/*-cp310-abi3-*.whl
"$work/full/bin/python" - <<'PY'
import shutil
import fastops
assert fastops._extension.C is not None, fastops._extension.C_MISSING
assert fastops._extension.HAS_CUDA_KERNELS or not shutil.which("nvcc"), "nvcc is here, but its kernels are not"
assert "site-packages" in fastops.__file__, fastops.__file__
PY
PYTHONSAFEPATH=1 "$work/full/bin/python" -m pytest tests -q -m 'not slow' -k 'not bitsandbytes'
