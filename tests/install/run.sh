#!/usr/bin/env bash
# usage: run.sh CMAKE BUILD CONSUMER SCRATCH CXX
set -euo pipefail
cmake=$1 build=$2 consumer=$3 scratch=$4 cxx=$5
prefix=$scratch/prefix
rm -rf "$prefix" "$scratch/consumer-build"
"$cmake" --install "$build" --prefix "$prefix" >"$scratch/install.log" || { cat "$scratch/install.log"; exit 1; }
# The installed package must not lead back to the source or build folders.
if grep -rlE "$(dirname "$build")/|$build" "$prefix/lib/cmake" "$prefix"/lib/*/cmake 2>/dev/null; then
  echo "installed CMake files name the build tree" >&2
  exit 1
fi
"$cmake" -S "$consumer" -B "$scratch/consumer-build" -DCMAKE_PREFIX_PATH="$prefix" -DCMAKE_CXX_COMPILER="$cxx" -DCMAKE_BUILD_TYPE=Debug >"$scratch/configure.log" 2>&1 ||
  { cat "$scratch/configure.log"; exit 1; }
"$cmake" --build "$scratch/consumer-build" >"$scratch/build.log" 2>&1 || { cat "$scratch/build.log"; exit 1; }
"$scratch/consumer-build/consumer"
"$prefix/bin/headfold" --version | grep -q '^headfold [0-9]'
