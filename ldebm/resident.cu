// == layout
// S: units a block; A: stride of activations, so that eight rows lie in different banks; L: layers of H x H
constexpr int C = 16, S = (H + C - 1) / C, Q = H / 4, A = H + (Q % 2 ? 0 : 4), L = N + 2,
              ACT = 2 * C * A > 2 * C * S * C ? 2 * C * A : 2 * C * S * C;
DEVICE constexpr int up4(int n) {
    return (n + 3) / 4 * 4;
}
constexpr int at_w = 0, at_first = L * S * H, at_head = up4(at_first + S * (D + 1)), at_bias = at_head + K * H,
              at_act = at_head + up4(K * H + (L + 1) * S + K), at_part = at_act + ACT, at_g = at_part + C * S * C,
              at_sign = at_g + S * C, at_z = at_sign + S * C, at_dz = at_z + C * D, at_red = at_dz + C * D,
              at_logit = at_red + 4 * D, at_piece = at_logit + 2 * K, FLOATS = at_piece + 8 * K;
static_assert(4 * FLOATS == BYTES && H % 4 == 0 && S <= 16 && D <= 256 && L < 32, "shape");

// == layers
struct Block {
    float *s, *w, *act, *part, *g;
    int tid, me;

    // Sums over the inputs of layer l, for unit tid%S of chain tid/S; activations in buffer p
    DEVICE float up(int l, int p) {
        const float* a = act + p * C * A;
        const float* wl = w + l * S * H;
        const int pair = tid % 8, slice = tid / 8;
        const bool second = slice & 1;
        float lo[S], hi[S];
#pragma unroll
        for (int c = 0; c < S; c++) lo[c] = hi[c] = 0.f;
        for (int q = slice; q < Q; q += 32) {
            const float4 x = *(const float4*)(a + pair * A + 4 * q), y = *(const float4*)(a + (pair + 8) * A + 4 * q);
#pragma unroll
            for (int c = 0; c < S; c++) {
                const float4 u = *(const float4*)(wl + c * H + 4 * q);
                lo[c] += x.x * u.x;
                lo[c] += x.y * u.y;
                lo[c] += x.z * u.z;
                lo[c] += x.w * u.w;
                hi[c] += y.x * u.x;
                hi[c] += y.y * u.y;
                hi[c] += y.z * u.z;
                hi[c] += y.w * u.w;
            }
        }
#pragma unroll
        for (int c = 0; c < S;
             c++) {  // of two neighbouring slices one thread keeps the first chain, the other the second
            const float other = swap8(second ? lo[c] : hi[c]);
            part[(slice / 2) * S * C + (pair + 8 * second) * S + c] = (second ? hi[c] : lo[c]) + other;
        }
        block_sync();
        float sum = 0.f;
        if (tid < S * C)
            for (int k = 0; k < C; k++) sum += part[k * S * C + tid];
        return sum;
    }

    // This block's share in the slopes of all inputs of layer l goes to their owners, by way of buffer p. Gives the sum
    // for unit tid/C of chain tid%C
    DEVICE float down(int l, int p, bool owns) {
        float* mail = act + p * C * S * C;
        const float* wl = w + l * S * H;
        for (int t = tid; t < 4 * Q; t += 256) {
            const int q = t % Q, r = t / Q * 4;
            float sum[4][4] = {};
#pragma unroll
            for (int c = 0; c < S; c++) {
                const float4 u = *(const float4*)(wl + c * H + 4 * q), d = *(const float4*)(g + c * C + r);
                const float us[4] = {u.x, u.y, u.z, u.w}, ds[4] = {d.x, d.y, d.z, d.w};
#pragma unroll
                for (int i = 0; i < 4; i++)
#pragma unroll
                    for (int j = 0; j < 4; j++) sum[i][j] += us[i] * ds[j];
            }
#pragma unroll
            for (int i = 0; i < 4; i++) {
                const int k = 4 * q + i;
                put4(mail + (me * S + k % S) * C + r, k / S, float4{sum[i][0], sum[i][1], sum[i][2], sum[i][3]});
            }
        }
        cluster_sync();
        float sum = 0.f;
        if (owns)
            for (int k = 0; k < C; k++) sum += mail[k * S * C + tid];
        return sum;
    }

    // Sums over coordinates, one a thread
    DEVICE float4 over_coordinates(float* red, float a, float b, float c, float d) {
        if (tid < D) {
            red[tid] = a;
            red[D + tid] = b;
            red[2 * D + tid] = c;
            red[3 * D + tid] = d;
        }
        block_sync();
        float4 t = {0.f, 0.f, 0.f, 0.f};
        for (int i = 0; i < D; i++) {
            t.x += red[i];
            t.y += red[D + i];
            t.z += red[2 * D + i];
            t.w += red[3 * D + i];
        }
        block_sync();
        return t;
    }
};

// == chains
KERNEL chains(const float* __restrict__ weights,  // W of z2, merge and blocks (L, H, H), their biases (L, H), W and b
                                                  // of z1 (H, D), (H), of the head (K, H), (K)
              const float* __restrict__ base,     // what of the merge layer stays the same, (B, H)
              const float* __restrict__ start, const float* __restrict__ means,  // (B, D)
              const float* __restrict__ rows,  // keep, toward, pull, sd, 1/temperature, variance: (B, 6)
              const float* __restrict__ noise, const float* __restrict__ uniform,  // (n, B, D), (n, B)
              float* __restrict__ out, float* __restrict__ seen, float* __restrict__ slope,
              float* __restrict__ total,  // (B, D), F and summed gradient at every evaluation (n+mala, B), (B)
              int B, int n, int mala, float drift) {
    float* s = memory();
    const int tid = thread(), me = cluster_rank(), row0 = cluster_id() * C, row = row0 + me, col0 = me * S;
    Block b{s, s + at_w, s + at_act, s + at_part, s + at_g, tid, me};
    float *first = s + at_first, *head = s + at_head, *bias = s + at_bias, *act = s + at_act, *g = s + at_g,
          *z = s + at_z, *dz = s + at_dz, *red = s + at_red, *logit = s + at_logit, *piece = s + at_piece;
    unsigned* sign = (unsigned*)(s + at_sign);

    // this block's part of the weights
    const float *biases = weights + L * H * H, *w1 = biases + L * H, *b1 = w1 + H * D, *wh = b1 + H, *bh = wh + K * H;
    for (int i = tid; i < L * S * H; i += 256) {
        const int l = i / (S * H), c = i / H % S, k = i % H;
        b.w[i] = col0 + c < H ? weights[(l * H + col0 + c) * H + k] : 0.f;
    }
    for (int i = tid; i < S * D; i += 256)
        first[i / D * (D + 1) + i % D] = col0 + i / D < H ? w1[(col0 + i / D) * D + i % D] : 0.f;
    for (int i = tid; i < K * H; i += 256) head[i] = wh[i];
    for (int i = tid; i < (L + 1) * S; i += 256) {
        const int l = i / S, c = i % S;
        bias[i] = col0 + c < H ? (l ? biases[(l - 1) * H + col0 + c] : b1[col0 + c]) : 0.f;
    }
    for (int i = tid; i < K; i += 256) bias[(L + 1) * S + i] = bh[i];
    if (tid < S * C) g[tid] = 0.f;  // stays so for units that only fill up

    // this thread's unit on the way up, on the way down, and its coordinate of the block's own chain
    const int chain = tid / S, c = tid % S;
    const bool unit = tid < S * C && col0 + c < H, owns = tid < S * C && col0 + tid / C < H, alive = row < B,
               coord = tid < D;
    const float same = unit && row0 + chain < B ? base[(row0 + chain) * H + col0 + c] : 0.f,
                m = coord && alive ? means[row * D + tid] : 0.f;
    const float* r = rows + 6 * (alive ? row : 0);
    const float keep = r[0], toward = r[1], pull = r[2], sd = r[3], beta = r[4], v = r[5],
                longest = drift * sqrtf((float)D) * sd;
    float x = coord && alive ? start[row * D + tid] : 0.f, y = 0.f, to = 0.f, e = 0.f, log_p = 0.f, sum_a = 0.f;

    auto tell = [&](float* there, float value) {
        for (int k = 0; k < C; k++) put(there, k, value);
    };
    auto bend = [&](int p, float h, int bit, unsigned& bits) {  // the activation, to every block
        const bool above = h > 0.f;
        if (above) bits |= 1u << bit;
        if (unit) tell(act + p * C * A + chain * A + col0 + c, above ? h : LEAK * h);
        cluster_sync();
    };

    cluster_sync();  // every block has begun
    if (coord) tell(z + me * D + tid, x);
    cluster_sync();
    for (int i = 0; i < n + mala; i++) {
        // up
        unsigned bits = 0, top = 0;
        float h = 0.f;
        int p = 0;
        auto through = [&](int l) {
            const float sum = b.up(l, p);
            p ^= 1;
            return sum + (unit ? bias[(l + 1) * S + c] : 0.f);
        };
        if (unit) {
            h = bias[c];
            for (int k = 0; k < D; k++) h += z[chain * D + k] * first[c * (D + 1) + k];
        }
        bend(p, h, 0, bits);
        h = through(0);
        bend(p, h, 1, bits);
        h = through(1) + same;
        for (int l = 2; l < L; l++) {
            bend(p, h, l, bits);
            h += through(l);
        }
        if (tid < S * C) sign[c * C + chain] = bits;
        bend(p, h, 31, top);
        // symbols of the block's own chain, F, and its slope before the last activation
        const float* a = act + p * C * A + me * A;
        for (int j = tid / 8; j < K; j += 32) {
            float sum = 0.f;
            for (int k = tid % 8; k < H; k += 8) sum += a[k] * head[j * H + k];
            piece[j * 8 + tid % 8] = sum;
        }
        block_sync();
        for (int j = tid; j < K; j += 256) {
            float sum = bias[(L + 1) * S + j];
            for (int k = 0; k < 8; k++) sum += piece[j * 8 + k];
            logit[j] = sum;
        }
        block_sync();
        float most = logit[0], norm = 0.f, all = 0.f;
        for (int j = 1; j < K; j++) most = fmaxf(most, logit[j]);
        for (int j = tid; j < K; j += 256) logit[K + j] = expf(logit[j] - most);
        block_sync();
        for (int j = 0; j < K; j++) {
            norm += logit[K + j];
            all += logit[j];
        }
        const float F = all == all ? most + logf(norm) : all;  // fmaxf passes NaN over
        for (int k = tid; k < H; k += 256) {
            float sum = 0.f;
            for (int j = 0; j < K; j++) sum += logit[K + j] * head[j * H + k];
            put(g + k % S * C + me, k / S, sum / norm * (a[k] > 0.f ? 1.f : LEAK));
        }
        cluster_sync();
        // down
        for (int l = L - 1, q = 0; l >= 0; l--, q ^= 1) {
            const float sum = b.down(l, q, owns);
            if (owns) {
                const float d = sum * (sign[tid] >> l & 1u ? 1.f : LEAK);
                g[tid] = l > 1 ? g[tid] + d : d;
            }
            block_sync();
        }
        for (int t = tid; t < C * D; t += 256) {
            const int k = t % D;
            float sum = 0.f;
            for (int u = 0; u < S; u++) sum += g[u * C + t / D] * first[u * (D + 1) + k];
            put(dz + me * D + k, t / D, sum);
        }
        cluster_sync();
        // the step of the block's own chain
        float gx = 0.f;
        if (coord)
            for (int k = 0; k < C; k++) gx += dz[k * D + tid];
        float move = pull * gx;
        const float4 sums = b.over_coordinates(red, gx, (x - m) * (x - m), move * move, e * e);
        if (drift < 1e30f) move *= fminf(1.f, longest / fmaxf(sqrtf(sums.z), 1e-30f));
        if (tid == 0 && alive) {
            seen[i * B + row] = F;
            slope[i * B + row] = sums.x;
        }
        const float next = keep * x + toward * m + move, log_px = F * beta - sums.y / (2.f * v);
        bool take = true;
        if (mala && i) {
            const float behind = b.over_coordinates(red, (y - next) * (y - next), 0.f, 0.f, 0.f).x,
                        log_a = log_px - log_p - behind / (2.f * sd * sd) + .5f * sums.w;
            const float accept = log_a == log_a ? expf(fminf(log_a, 0.f)) : 0.f;
            sum_a += accept;
            take = alive && uniform[(i - 1) * B + row] < accept;
        }
        if (take) {
            y = x;
            to = next;
            log_p = log_px;
        }
        if (i < n) {
            e = coord && alive ? noise[((long long)i * B + row) * D + tid] : 0.f;
            x = to + sd * e;
            if (coord) tell(z + me * D + tid, x);
            cluster_sync();
        }
    }
    if (coord && alive) out[row * D + tid] = mala ? y : x;
    if (tid == 0 && alive) total[row] = sum_a;
}
