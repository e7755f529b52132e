#!/usr/bin/env bash
# The block-sparse int8 kernels under AddressSanitizer and UndefinedBehaviorSanitizer, all instruction sets of this CPU against
# the scalar code: tests/sanitize_bsr.sh [rounds] [seed]
set -euo pipefail
cd "$(dirname "$0")/../native/bsr_int8"
out=$(mktemp -d)
trap 'rm -rf "$out"' EXIT
flags=(-std=c++17 -O1 -g -Wall -Wextra -ffp-contract=off -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all)
avx2=(-mavx2 -mfma)
avx512=("${avx2[@]}" -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mavx512vbmi2 -mavx512vnni -Wno-uninitialized -Wno-maybe-uninitialized)
if [ "$(uname -m)" = x86_64 ]; then
  flags+=(-DGOSSAMER_X86)
  "${CXX:-g++}" "${flags[@]}" "${avx2[@]}" -c avx2.cpp -o "$out/avx2.o"
  "${CXX:-g++}" "${flags[@]}" "${avx2[@]}" -mavxvnni -c avxvnni.cpp -o "$out/avxvnni.o"
  "${CXX:-g++}" "${flags[@]}" "${avx512[@]}" -c avx512.cpp -o "$out/avx512.o"
  "${CXX:-g++}" "${flags[@]}" "${avx512[@]}" -mamx-tile -mamx-int8 -c amx.cpp -o "$out/amx.o"
fi
for source in fuzz pack run scalar ../parallel; do
  "${CXX:-g++}" "${flags[@]}" -c "$source.cpp" -o "$out/$(basename "$source").o"
done
"${CXX:-g++}" "${flags[@]}" "$out"/*.o -o "$out/fuzz" -pthread -ldl
"$out/fuzz" "${1:-300}" "${2:-1}"
# Without AVX-VNNI its code takes AVX2's place, with products in plain code.
if [ "$(uname -m)" = x86_64 ] && ! grep -qw avx_vnni /proc/cpuinfo; then
  "${CXX:-g++}" "${flags[@]}" "${avx2[@]}" -include ../../tests/emulate_vnni.h -Davxvnni_kernels=avx2_kernels \
    -c avxvnni.cpp -o "$out/avx2.o"
  "${CXX:-g++}" "${flags[@]}" "$out"/*.o -o "$out/emulated" -pthread -ldl
  GOSSAMER_ISA=avx2 "$out/emulated" "${1:-300}" "${2:-1}"
fi
