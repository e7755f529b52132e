#!/usr/bin/env bash
# The index's C++ under AddressSanitizer and UndefinedBehaviorSanitizer, on damaged segments: tests/sanitize_index.sh [rounds] [seed]
set -euo pipefail
cd "$(dirname "$0")/../native/retrieval"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags=(-std=c++17 -O1 -g -Wall -Wextra -ffp-contract=off -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
avx2=(-mavx2 -mbmi -mbmi2 -mpopcnt)
sources=(fuzz build checksum group search segment kernels_scalar ../isa ../parallel)
if [ "$(uname -m)" = x86_64 ]; then
  flags+=(-DGOSSAMER_X86)
  "${CXX:-g++}" "${flags[@]}" "${avx2[@]}" -c kernels_avx2.cpp -o "$out/avx2.o"
  "${CXX:-g++}" "${flags[@]}" "${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2 \
    -c kernels_avx512.cpp -o "$out/avx512.o"
fi
for source in "${sources[@]}"; do
  "${CXX:-g++}" "${flags[@]}" -c "$source.cpp" -o "$out/$(basename "$source").o"
done
"${CXX:-g++}" "${flags[@]}" "$out"/*.o -o "$out/fuzz" -pthread -ldl
"$out/fuzz" "${1:-300}" "${2:-1}"
