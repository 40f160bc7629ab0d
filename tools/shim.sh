#!/bin/sh
# Makes the package importable from the source tree with nothing installed:  tools/shim.sh DIR  then PYTHONPATH=DIR.
# DIR/fastops is a folder of links that repeats pyproject.toml's package map (pyops -> fastops, triton_ops ->
# fastops.triton_ops, reference -> fastops.reference). Used by `make gpu` and by mypy, which cannot follow the map.
set -eu
root=$(cd "$(dirname "$0")/.." && pwd)
rm -rf "$1/fastops"
mkdir -p "$1/fastops"
for part in "$root"/pyops/* "$root/triton_ops" "$root/reference"; do
  case ${part##*/} in __pycache__) continue ;; esac
  ln -s "$part" "$1/fastops/"
done
