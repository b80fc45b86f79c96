// == registers
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <system_error>
#include <thread>
#include <vector>
#if HALF
#include <immintrin.h>
#endif
typedef REAL real;
#ifdef __AVX512F__
constexpr int WIDTH = 64, MR = 6, NV = 4;  // bytes of a register; rows and registers of a tile
#else
constexpr int WIDTH = 32, MR = 6, NV = 2;
#endif
constexpr int SLAB = 64;  // chains carried together
typedef real V __attribute__((vector_size(WIDTH), may_alias));
constexpr int LANES = WIDTH / sizeof(real);
constexpr int whole(int n) {
    return (n + LANES - 1) / LANES * LANES;
}
static inline V& at(real* x) {
    return *(V*)x;
}
static inline V at(const real* x) {
    return *(const V*)x;
}
static real total(V x) {
    real s = 0;
    for (int i = 0; i < LANES; i++) s += x[i];
    return s;
}

#if HALF  // products in bfloat16, sums in single precision
typedef uint16_t item;
constexpr int PAIR = 2;  // inputs an instruction takes
static item narrow(real x) {
    uint32_t u;
    memcpy(&u, &x, 4);
    return x == x ? (u + 0x7fff + (u >> 16 & 1)) >> 16 : 0x7fc0;
}
static inline void put(item* to, V x) {
    __m256bh b = _mm512_cvtneps_pbh((__m512)x);
    memcpy(to, &b, 32);
}
static inline V get(const item* a) {
    typedef uint16_t Half __attribute__((vector_size(WIDTH / 2)));
    typedef uint32_t Bits __attribute__((vector_size(WIDTH)));
    Half b;
    memcpy(&b, a, sizeof b);
    return (V)(__builtin_convertvector(b, Bits) << 16);
}
static inline V times(V sum, const item* w, const item* x) {
    uint32_t two;
    memcpy(&two, x, 4);
    return (V)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_load_si512(w), (__m512bh)_mm512_set1_epi32(two));
}
#else
typedef real item;
constexpr int PAIR = 1;
static item narrow(real x) {
    return x;
}
static inline void put(item* to, V x) {
    at(to) = x;
}
static inline V get(const item* a) {
    return at(a);
}
static inline V times(V sum, const item* w, const item* x) {
    return sum + at(w) * *x;
}
#endif

// == products
struct Map {  // a matrix of weights, laid out as it is read: panels of up to NV registers, input after input
    int in, out, steps, wide, panels;
    Map(int in, int out)
        : in(in), out(out), steps((in + PAIR - 1) / PAIR), wide(whole(out) / LANES), panels((wide + NV - 1) / NV) {}
    long size() const { return (long)steps * PAIR * wide * LANES; }
    int first(int p) const { return p * (wide / panels) + std::min(p, wide % panels); }
    void pack(item* to, const real* w, int per_in, int per_out) const {
        for (int p = 0; p < panels; p++)
            for (int k = 0; k < steps; k++)
                for (int o = first(p) * LANES; o < first(p + 1) * LANES; o++)
                    for (int i = k * PAIR; i < (k + 1) * PAIR; i++)
                        *to++ = i < in && o < out ? narrow(w[(long)i * per_in + (long)o * per_out]) : 0;
    }
    template <int n, int m, class F>
    void tile(const item* w, const item* x, int stride, int r0, int v0, F& done) const {
        V sum[m][n] = {};
        for (int k = 0; k < steps; k++, w += n * LANES * PAIR) {
#pragma GCC unroll 8
            for (int r = 0; r < m; r++)
#pragma GCC unroll 8
                for (int j = 0; j < n; j++)
                    sum[r][j] = times(sum[r][j], w + j * LANES * PAIR, x + (long)(r0 + r) * stride + k * PAIR);
        }
#pragma GCC unroll 8
        for (int r = 0; r < m; r++)
#pragma GCC unroll 8
            for (int j = 0; j < n; j++) done(r0 + r, (v0 + j) * LANES, sum[r][j]);
    }
    template <int n, int m, class F>
    void rows(const item* w, const item* x, int stride, int r0, int many, int v0, F& done) const {
        if constexpr (m > 0) {
            if (many == m)
                tile<n, m>(w, x, stride, r0, v0, done);
            else
                rows<n, m - 1>(w, x, stride, r0, many, v0, done);
        }
    }
    template <int n, class F>
    void panel(const item* w, const item* x, int stride, int R, int v0, int many, F& done) const {
        if constexpr (n > 0) {
            if (many != n) return panel<n - 1>(w, x, stride, R, v0, many, done);
            const int tiles = (R + MR - 1) / MR;
            for (int t = 0, r = 0, m; t < tiles; t++, r += m) {
                m = R / tiles + (t < R % tiles);
                rows<n, MR>(w, x, stride, r, m, v0, done);
            }
        }
    }
    template <class F>
    void run(const item* w, const item* x, int stride, int R, F done) const {  // done(row, first output, sums)
        for (int p = 0; p < panels; p++)
            panel<NV>(w + (long)first(p) * LANES * PAIR * steps, x, stride, R, first(p), first(p + 1) - first(p), done);
    }
};

// == network
struct Net {
    int D, H, K, L, DS, HS, KS;
    real slope;
    Map first, last, mid, head, tail;  // d -> H, H -> d, H -> H, H -> K, K -> H
    long at_first, at_last, at_head, at_tail, at_up, at_down, items, biases;
    Net(int d, int hidden, int n_symbols, int n_blocks, double slope)
        : D(d),
          H(hidden),
          K(n_symbols),
          L(n_blocks + 2),
          DS(whole(d)),
          HS(whole(hidden)),
          KS(whole(n_symbols)),
          slope(slope),
          first(d, hidden),
          last(hidden, d),
          mid(hidden, hidden),
          head(hidden, n_symbols),
          tail(n_symbols, hidden) {
        at_first = 0;
        at_last = at_first + first.size();
        at_head = at_last + last.size();
        at_tail = at_head + head.size();
        at_up = at_tail + tail.size();
        at_down = at_up + L * mid.size();
        items = at_down + L * mid.size();
        biases = (L + 1) * HS + KS;
    }
    V leak(V x) const { return x > 0 ? x : slope * x; }
    V back(V g, const item* a) const {
        return get(a) > 0 ? g : slope * g;
    }  // what the activation gave has the sign of its argument
};

struct Room {  // zeros, aligned
    std::unique_ptr<char[]> all;
    char* next;
    Room(size_t n) : all(new char[n + 64]()) { afresh(); }
    void afresh() { next = (char*)(((uintptr_t)all.get() + 63) / 64 * 64); }
    template <class T>
    T* take(size_t n) {
        T* p = (T*)next;
        next += (n * sizeof(T) + 63) / 64 * 64;
        return p;
    }
};

typedef void (*Parallel)(void (*)(void*), void*, unsigned, unsigned);  // GOMP_parallel, if there is one
template <class F>
static void on_threads(int n, Parallel parallel, F work) {
    if (n > 1 && parallel) return parallel([](void* f) { (*(F*)f)(); }, &work, n, 0);
    std::vector<std::thread> others;
    try {
        for (int i = 1; i < n; i++) others.emplace_back(work);
    } catch (const std::system_error&) {
    }  // no more to be had: those there are share the work
    work();
    for (auto& t : others) t.join();
}

struct Slab {  // chains that are carried together, and what their network needs
    const Net& net;
    const real* b;
    const item* w;
    int most;
    Room room;
    item *a, *g[2], *s, *z;
    real *h, *sum, *base, *dz, *logit, *F;
    Slab(const Net& net, const char* packed, int most)
        : net(net),
          b((const real*)packed),
          w((const item*)(b + net.biases)),
          most(most),
          room((size_t)most * (((size_t)net.L + 3) * net.HS * sizeof(item) + (net.KS + net.DS) * sizeof(item) +
                               (3 * net.HS + net.DS + net.KS + 1) * sizeof(real)) +
               16 * 64) {
        const size_t n = most;
        a = room.take<item>((net.L + 1) * n * net.HS);
        for (auto& x : g) x = room.take<item>(n * net.HS);
        s = room.take<item>(n * net.KS);
        z = room.take<item>(n * net.DS);
        h = room.take<real>(n * net.HS);
        sum = room.take<real>(n * net.HS);
        base = room.take<real>(n * net.HS);
        dz = room.take<real>(n * net.DS);
        logit = room.take<real>(n * net.KS);
        F = room.take<real>(n);
    }
    void grad(int R, const int64_t* symbols) {  // of R chains: F, or the logit of a symbol, and dz, its gradient at z
        const int L = net.L, HS = net.HS, KS = net.KS, DS = net.DS, K = net.K;
        const long M = net.mid.size();
        auto act = [&](int l) { return a + (size_t)l * most * HS; };
        auto up = [&](int l, const item* x, int stride, const Map& map, const item* w,
                      auto more) {  // bias of layer l, the rest of its argument, and its activation
            map.run(w, x, stride, R, [&](int r, int o, V y) {
                y += at(b + l * HS + o);
                more(r * HS + o, y);
                put(act(l) + r * HS + o, net.leak(y));
            });
        };
        up(0, z, DS, net.first, w + net.at_first, [](int, V&) {});
        up(1, act(0), HS, net.mid, w + net.at_up, [](int, V&) {});
        up(2, act(1), HS, net.mid, w + net.at_up + M, [&](int i, V& y) {
            y += at(base + i);
            at(h + i) = y;
        });
        for (int l = 2; l < L; l++)
            up(l + 1, act(l), HS, net.mid, w + net.at_up + l * M, [&](int i, V& y) {
                y += at(h + i);
                at(h + i) = y;
            });
        net.head.run(w + net.at_head, act(L), HS, R,
                     [&](int r, int o, V y) { at(logit + r * KS + o) = y + at(b + (L + 1) * HS + o); });
        for (int r = 0; r < R; r++) {
            real *f = logit + r * KS, top = f[0], norm = 0, all = 0;
            if (symbols) {
                F[r] = f[symbols[r]];
                for (int j = 0; j < K; j++) s[r * KS + j] = narrow(j == symbols[r]);
                continue;
            }
            for (int j = 0; j < K; j++) {
                top = f[j] > top ? f[j] : top;
                all += f[j];
            }
            for (int j = 0; j < K; j++) norm += f[j] = std::exp(f[j] - top);
            F[r] = all == all ? top + std::log(norm) : all;  // a comparison passes NaN over
            for (int j = 0; j < K; j++) s[r * KS + j] = narrow(f[j] / norm);
        }
        net.tail.run(w + net.at_tail, s, KS, R, [&](int r, int o, V y) {
            const int i = r * HS + o;
            y = net.back(y, act(L) + i);
            if (HALF) at(sum + i) = y;
            put(g[0] + i, y);
        });
        int p = 0;
        for (int l = L - 1; l >= 0; l--, p ^= 1)
            net.mid.run(w + net.at_down + l * M, g[p], HS, R, [&](int r, int o, V y) {
                const int i = r * HS + o;
                y = net.back(y, act(l) + i);
                if (l > 1) {
                    if (HALF)
                        at(sum + i) = y += at(sum + i);
                    else
                        y += get(g[p] + i);
                }  // past a block the slope goes on
                put(g[p ^ 1] + i, y);
            });
        net.last.run(w + net.at_last, g[p], HS, R, [&](int r, int o, V y) { at(dz + r * DS + o) = y; });
    }
};

// == chains
extern "C" long packed_bytes(int d, int hidden, int n_symbols, int n_blocks) {
    const Net net(d, hidden, n_symbols, n_blocks, 0);
    return net.biases * sizeof(real) + net.items * sizeof(item);
}

extern "C" void pack(int d, int hidden, int n_symbols, int n_blocks, int threads, Parallel parallel,
                     const real* weights, char* to) {  // to: aligned to 64 bytes
    const Net net(d, hidden, n_symbols, n_blocks, 0);
    const int D = d, H = hidden, K = n_symbols, L = net.L;
    const long M = net.mid.size();
    const real *own = weights + (long)L * H * H, *w1 = own + L * H, *b1 = w1 + H * D, *wh = b1 + H, *bh = wh + K * H;
    real* b = (real*)to;
    item* w = (item*)(b + net.biases);
    std::fill(b, b + net.biases, 0);
    std::copy(b1, b1 + H, b);
    for (int l = 0; l < L; l++) std::copy(own + l * H, own + (l + 1) * H, b + (l + 1) * net.HS);
    std::copy(bh, bh + K, b + (L + 1) * net.HS);
    net.first.pack(w + net.at_first, w1, 1, D);
    net.last.pack(w + net.at_last, w1, D, 1);
    net.head.pack(w + net.at_head, wh, 1, H);
    net.tail.pack(w + net.at_tail, wh, H, 1);
    std::atomic<int> next{0};
    on_threads(threads, parallel, [&] {
        for (int l; (l = next++) < L;) {
            net.mid.pack(w + net.at_up + l * M, weights + (long)l * H * H, 1, H);
            net.mid.pack(w + net.at_down + l * M, weights + (long)l * H * H, H, 1);
        }
    });
}

struct Shares {  // of B chains: slabs of about the same size, as many for each thread
    int B, threads, slabs;
    Shares(int B, int most)
        : B(B),
          threads(std::max(1, std::min(most, (B + MR - 1) / MR))),
          slabs(((B + SLAB - 1) / SLAB + threads - 1) / threads * threads) {}
    int most() const { return (B + slabs - 1) / slabs; }
    int rows(int k) const { return B / slabs + (k < B % slabs); }
    long first(int k) const { return (long)k * (B / slabs) + std::min(k, B % slabs); }
};

// work(slab, room, chains, first of them) for every slab: 0, or 1 where there is no room
template <class F>
static int over_slabs(const Net& net, const char* packed, const Shares& shares, size_t bytes, Parallel parallel,
                      F work) {
    std::vector<std::unique_ptr<Slab>> own;
    std::vector<std::unique_ptr<Room>> more;  // of each thread
    try {
        for (int i = 0; i < shares.threads; i++) {
            own.emplace_back(new Slab(net, packed, shares.most()));
            more.emplace_back(new Room(bytes));
        }
    } catch (const std::bad_alloc&) {
        return 1;
    }
    std::atomic<int> next{0}, at_work{0};
    on_threads(shares.threads, parallel, [&] {
        const int me = at_work++;
        for (int k; (k = next++) < shares.slabs;) {
            more[me]->afresh();
            work(*own[me], *more[me], shares.rows(k), shares.first(k));
        }
    });
    return 0;
}

template <class T>
static void widen(T* to, int stride, const T* from, int width, int rows) {
    for (int r = 0; r < rows; r++)
        std::copy(from + (long)r * width, from + (long)(r + 1) * width, to + (long)r * stride);
}

extern "C" int gradient(int d, int hidden, int n_symbols, int n_blocks, double leak, int B, int threads,
                        Parallel parallel, const char* packed, const real* base, const real* at_z,
                        const int64_t* symbols, real* F, real* dz) {
    if (B < 1) return 0;
    const Net net(d, hidden, n_symbols, n_blocks, leak);
    const int D = net.D, DS = net.DS;
    const Shares shares(B, threads);
    const int most = shares.most();
    return over_slabs(net, packed, shares, (size_t)most * DS * sizeof(real) + 64, parallel,
                      [&](Slab& slab, Room& room, int R, long r0) {
                          real* x = room.take<real>(most * DS);
                          widen(slab.base, net.HS, base + r0 * net.H, net.H, R);
                          widen(x, DS, at_z + r0 * D, D, R);
                          for (int j = 0; j < R * DS; j += LANES) put(slab.z + j, at(x + j));
                          slab.grad(R, symbols ? symbols + r0 : nullptr);
                          for (int r = 0; r < R; r++) {
                              F[r0 + r] = slab.F[r];
                              std::copy(slab.dz + r * DS, slab.dz + r * DS + D, dz + (r0 + r) * D);
                          }
                      });
}

extern "C" int chains(int d, int hidden, int n_symbols, int n_blocks, double leak, int B, int n, int mala, double drift,
                      int threads, Parallel parallel, const char* packed, const real* base, const real* start,
                      const real* means, const real* rows, const real* noise, const real* uniform,
                      const int64_t* symbols, real* out, real* seen, real* slope, real* accepted) {
    if (B < 1) return 0;
    const Net net(d, hidden, n_symbols, n_blocks, leak);
    const int D = net.D, DS = net.DS;
    const Shares shares(B, threads);
    const int most = shares.most();
    return over_slabs(
        net, packed, shares, (size_t)most * (5 * DS + 2) * sizeof(real) + 8 * 64, parallel,
        [&](Slab& slab, Room& room, int R, long r0) {
            real *x = room.take<real>(most * DS), *y = room.take<real>(most * DS), *to = room.take<real>(most * DS),
                 *m = room.take<real>(most * DS), *e = room.take<real>(most * DS), *log_p = room.take<real>(most),
                 *sum_a = room.take<real>(most);
            widen(slab.base, net.HS, base + r0 * net.H, net.H, R);
            widen(x, DS, start + r0 * D, D, R);
            widen(m, DS, means + r0 * D, D, R);
            std::fill(sum_a, sum_a + R, 0);
            for (real* rows : {x, y, to, e})
                for (int r = 0; r < R; r++)
                    std::fill(rows + r * DS + D, rows + (r + 1) * DS,
                              0);  // a chain that is lost leaves nothing to the next
            for (int i = 0; i < n + mala; i++) {
                for (int j = 0; j < R * DS; j += LANES) put(slab.z + j, at(x + j));
                slab.grad(R, symbols ? symbols + r0 : nullptr);
                for (int r = 0; r < R; r++) {
                    const real *c = rows + 6 * (r0 + r), keep = c[0], toward = c[1], pull = c[2], sd = c[3],
                               beta = c[4], var = c[5], *g = slab.dz + r * DS;
                    real *xr = x + r * DS, *yr = y + r * DS, *tr = to + r * DS, *er = e + r * DS;
                    const real* mr = m + r * DS;
                    V steep{}, length{}, away{}, behind{}, chance{};
                    for (int j = 0; j < DS; j += LANES) {
                        const V move = pull * at(g + j), off = at(xr + j) - at(mr + j);
                        steep += at(g + j);
                        length += move * move;
                        away += off * off;
                    }
                    real push = pull;
                    if (drift < 1e30)
                        push *= std::min((real)1, (real)drift * std::sqrt((real)D) * sd /
                                                      std::max(std::sqrt(total(length)), (real)1e-30));
                    seen[(long)i * B + r0 + r] = slab.F[r];
                    slope[(long)i * B + r0 + r] = total(steep);
                    const real log_px = slab.F[r] * beta - total(away) / (2 * var);
                    auto ahead = [&](int j) { return keep * at(xr + j) + toward * at(mr + j) + push * at(g + j); };
                    bool take = true;
                    if (mala && i) {
                        for (int j = 0; j < DS; j += LANES) {
                            const V off = at(yr + j) - ahead(j);
                            behind += off * off;
                            chance += at(er + j) * at(er + j);
                        }
                        const real log_a = log_px - log_p[r] - total(behind) / (2 * sd * sd) + total(chance) / 2,
                                   accept = log_a == log_a ? std::exp(std::min(log_a, (real)0)) : 0;
                        sum_a[r] += accept;
                        take = uniform[(long)(i - 1) * B + r0 + r] < accept;
                    }
                    if (take) {
                        for (int j = 0; j < DS; j += LANES) {
                            at(tr + j) = ahead(j);
                            at(yr + j) = at(xr + j);
                        }
                        log_p[r] = log_px;
                    }
                    if (i < n) {
                        const real* now = noise + ((long)i * B + r0 + r) * D;
                        std::copy(now, now + D, er);
                        for (int j = 0; j < DS; j += LANES) at(xr + j) = at(tr + j) + sd * at(er + j);
                    }
                }
            }
            const real* end = mala ? y : x;
            for (int r = 0; r < R; r++) {
                std::copy(end + r * DS, end + r * DS + D, out + (r0 + r) * D);
                accepted[r0 + r] = sum_a[r];
            }
        });
}
