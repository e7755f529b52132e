// Included by lscd.cuh and nm24.cuh, after their constants, for what follows the products: warps that multiplied parts of
// the same rows have their sums added, then the blocks of a cluster, in the same order always, and y is written.

constexpr int SUM_PITCH = 20;  // floats of one token's 16 sums: no two lanes of an accumulator in one bank

// Where the sums of a block of threads belong: `high` pieces of 16 * PAIR rows, each shared by `split` of its `warps`,
// in panel `index`, of whose rows a block of a cluster adds up its `rank`-th share.
struct Panel {
  int index, high, split, warps;
  u32 rank;
};

// `partial`: shared memory that nothing else needs any more. Called by all threads of the block, of which those of
// `warps` have sums. Warps that share rows are STRIDE warps apart; SHARE blocks are a cluster.
template <int STRIDE, int SHARE>
__device__ inline void write_sums(float* partial, const float (&sums)[PAIR][TILES][4], const Panel& panel, int warp,
                                  int lane, const u16* bias, u16* y, i32 rows, i32 tokens) {
  constexpr int TALL = 16 * PAIR;
  const int split = panel.split;
  if (warp < panel.warps) {
#pragma unroll
    for (int p = 0; p < PAIR; ++p)
#pragma unroll
      for (int tile = 0; tile < TILES; ++tile)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int token = tile * 8 + lane % 4 * 2 + i % 2, row = lane / 4 + i / 2 * 8;
          partial[((warp * PAIR + p) * TOKENS + token) * SUM_PITCH + row] = sums[p][tile][i];
        }
  }
  if constexpr (SHARE > 1)
    cluster_sync();
  else
    __syncthreads();

  // Item i is token i / share and row i % share of a block's share of the rows; both are small, so a product divides.
  const int share = panel.high * TALL / SHARE, items = share * tokens;
  const u32 inverse = 0xffffffffu / share + 1, rank = panel.rank;
  const auto total = [&](int row, int token) {
    const int at = row / TALL, first_warp = at / STRIDE * STRIDE * split + at % STRIDE;
    const float* parts = partial + ((first_warp * PAIR + row % TALL / 16) * TOKENS + token) * SUM_PITCH + row % 16;
    float sum = 0;
    for (int c = 0; c < split; ++c) sum += parts[c * STRIDE * PAIR * TOKENS * SUM_PITCH];
    return sum;
  };
  float* received = partial + panel.warps * PAIR * TOKENS * SUM_PITCH;
  if constexpr (SHARE > 1) {
    for (int j = 1; j < SHARE; ++j) {
      const u32 peer = (rank + j) % SHARE, to = address(received) + (SHARE - 1 - j) * items * 4;
      for (u32 i = threadIdx.x; i < items; i += blockDim.x) {
        const u32 token = __umulhi(i, inverse), row = i - token * share;
        store_in_peer(to + 4 * i, peer, total(peer * share + row, token));
      }
    }
    cluster_sync();
  }
  const i64 top = (i64)panel.index * panel.high * TALL + rank * share;
  for (u32 i = threadIdx.x; i < items; i += blockDim.x) {
    const u32 token = __umulhi(i, inverse), row = i - token * share;
    if (top + row >= rows) continue;
    float sum = total(rank * share + row, token);
    if constexpr (SHARE > 1)
      for (int j = 0; j < SHARE - 1; ++j) sum += received[j * items + i];
    if (bias) sum += widen(bias[top + row]);
    y[token * (i64)rows + top + row] = narrow(sum);
  }
}
