#!/bin/bash
# Proves that the CUDA code was compiled and linked: every function of CUDA's libraries that a source file calls is an undefined symbol of
# the archives made from them, and the programs need the libraries.
# usage: check_linked.sh NM READELF SOURCE_DIR ARCHIVE... -- PROGRAM...
set -euo pipefail
nm=$1 readelf=$2 source=$3
shift 3
archives=() programs=()
while [[ $# -gt 0 && $1 != -- ]]; do archives+=("$1"); shift; done
shift
programs=("$@")

symbols=$("$nm" --undefined-only "${archives[@]}" 2>/dev/null | awk '$1 == "U" {print $2}' | sort -u)
files=$(grep -lE '#include <(headfold/base/cuda\.h|cuda_runtime_api\.h|cublas_v2\.h|cusolverDn\.h|nccl\.h)>' -r "$source/src" --include=*.cpp)
calls=$(grep -ohE '\b(cuda[A-Z]|cublas[A-Z]|cusolverDn[A-Z]|nccl[A-Z])[A-Za-z0-9]+(_bufferSize)?\(' $files | tr -d '(' | sort -u)
# Called in the branches for older toolkits only.
older="cudaMemset"
failures=0
for call in $calls; do
  [[ " $older " == *" $call "* ]] && continue
  if ! grep -qE "^${call}(_v[0-9]+)?$" <<<"$symbols"; then
    echo "$call is called in a source file, and in no object file of ${archives[*]##*/}"
    failures=$((failures + 1))
  fi
done
needed=$(for program in "${programs[@]}"; do "$readelf" -d "$program"; done | grep NEEDED | sort -u)
for library in libcudart libcublas libcusolver libnccl; do
  if ! grep -q "\[$library\.so" <<<"$needed"; then
    echo "$library is needed by none of ${programs[*]##*/}"
    failures=$((failures + 1))
  fi
done
echo "$(wc -l <<<"$files") source files, $(wc -w <<<"$calls") functions"
[[ $failures -eq 0 ]]
