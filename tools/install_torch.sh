#!/bin/sh
# Installs the torch that a constraints file pins:  tools/install_torch.sh PYTHON CONSTRAINTS
# The usual index holds a torch with gigabytes of CUDA libraries. A machine without a GPU takes the CPU build: from the
# configured index where it is there, else from the index of the PyTorch project.
set -eu
python=$1
wanted=$(sed -n 's/^\(torch==[^ ]*\).*/\1/p' "$2")
pip() { "$python" -m pip install --disable-pip-version-check "$@"; }

if "$python" -c "import importlib.metadata as m, sys; sys.exit('torch==' + m.version('torch') != '$wanted')" 2>/dev/null; then
  exit 0
fi
case $wanted in
  *+cpu)
    if pip --dry-run --no-deps --quiet "$wanted" >/dev/null 2>&1; then
      pip --no-deps "$wanted"
    else
      pip --no-deps --index-url https://download.pytorch.org/whl/cpu "$wanted"
    fi ;;
  *) pip --no-deps "$wanted" ;;
esac
