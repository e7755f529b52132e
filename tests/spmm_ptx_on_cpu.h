// spmm_ptx.cuh in C++; the products lay their operands out as the PTX manual does.
inline float half_to_float(u16 x) {
  _Float16 y;
  memcpy(&y, &x, 2);
  return (float)y;
}
inline u32 rounded(float x) {
  if (TYPE == 0) {
    const _Float16 y = (_Float16)x;
    u16 bits;
    memcpy(&bits, &y, 2);
    return bits;
  }
  const u32 bits = __float_as_uint(x);
  return std::isnan(x) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline u32 rounded_pair(float low, float high) { return rounded(low) | rounded(high) << 16; }
inline u32 to_tf32(u32 x) { return (x & 0x7f800000) == 0x7f800000 ? x : (x + 0x1000) & ~0x1fffu; }

inline float part(u32 word, int half) {
  const u16 bits = (u16)(word >> 16 * half);
  return TYPE == 0 ? half_to_float(bits) : __uint_as_float((u32)bits << 16);
}
inline void show(const u32 (&mine)[6]) {
  memcpy(slots[warp_of()][lane_of()], mine, sizeof mine);
  meet_warp();
}
inline void multiply16(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  show({a0, a1, a2, a3, b0, b1});
  const auto& all = slots[warp_of()];
  for (int i = 0; i < 4; ++i) {
    const int row = lane_of() / 4 + i / 2 * 8, col = lane_of() % 4 * 2 + i % 2;
    for (int k = 0; k < 16; ++k) {
      const u32 a = all[row % 8 * 4 + k % 8 / 2][row / 8 + k / 8 * 2], b = all[col * 4 + k % 8 / 2][4 + k / 8];
      d[i] += part(a, k % 2) * part(b, k % 2);
    }
  }
  meet_warp();
}
inline void multiply32(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  show({a0, a1, a2, a3, b0, b1});
  const auto& all = slots[warp_of()];
  for (int i = 0; i < 4; ++i) {
    const int row = lane_of() / 4 + i / 2 * 8, col = lane_of() % 4 * 2 + i % 2;
    for (int k = 0; k < 8; ++k) {
      const u32 a = all[row % 8 * 4 + k % 4][row / 8 + k / 4 * 2], b = all[col * 4 + k % 4][4 + k / 4];
      d[i] += __uint_as_float(a) * __uint_as_float(b);
    }
  }
  meet_warp();
}
