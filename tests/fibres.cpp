// Runs the kernel of ldebm.resident on a processor: every thread of a cluster is a fibre. Between two waits fibres run in random order, and blocks lag behind
// each other at random, so that what depends on an order that nothing guarantees comes out differently from run to run.
#include <setjmp.h>
#include <ucontext.h>
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>
#define __restrict__
#define DEVICE inline
#define KERNEL static void
struct float4 { float x, y, z, w; };
enum Wait { NONE, WARP, BLOCK, CLUSTER, DONE };
struct Fibre { ucontext_t context; jmp_buf at; Wait wait; bool begun; int swaps; };
static const int BLOCKS = 16, PER = 256, ALL = BLOCKS*PER, STACK = 1 << 16;
static Fibre fibres[ALL];
static ucontext_t nowhere;
static jmp_buf scheduler;
static std::vector<float> shared[BLOCKS];
static float swapped[2][ALL];
static int now, cluster;
static void wait(Wait w) { Fibre& f = fibres[now]; f.wait = w; if (!_setjmp(f.at)) _longjmp(scheduler, 1); }
static void resume(Fibre& f) { // a context to begin with, jumps from then on: they leave signals alone, and are ten times as fast
    if (_setjmp(scheduler)) return;
    if (f.begun) _longjmp(f.at, 1);
    f.begun = true; setcontext(&f.context);
}
static float* memory() { return shared[now/PER].data(); }
static int thread() { return now%PER; }
static int cluster_id() { return cluster; }
static int cluster_rank() { return now/PER; }
static void block_sync() { wait(BLOCK); }
static void cluster_sync() { wait(CLUSTER); }
static void put(float* p, int rank, float x) { shared[rank].at(p-memory()) = x; }
static void put4(float* p, int rank, float4 x) {
    const size_t i = p-memory();
    if (i%4) { fprintf(stderr, "a vector that is not aligned\n"); abort(); }
    float* to = &shared[rank].at(i); to[0] = x.x; to[1] = x.y; to[2] = x.z; to[3] = x.w;
}
static float swap8(float x) { const int me = now, turn = fibres[me].swaps++ & 1; swapped[turn][me] = x; wait(WARP); return swapped[turn][me^8]; }
using std::fmaxf; using std::fminf;

#include KERNEL_SOURCE

static const void* tensors[11]; static int numbers[3]; static float longest;
static void go() {
    auto in = [](int i) { return (const float*)tensors[i]; }; auto out = [](int i) { return (float*)tensors[i]; };
    chains(in(0), in(1), in(2), in(3), in(4), in(5), in(6), out(7), out(8), out(9), out(10), numbers[0], numbers[1], numbers[2], longest);
    wait(DONE);
}
static bool release(Wait w, int size) { // groups of which everyone waits go on
    bool any = false;
    for (int i = 0; i < ALL; i += size)
        if (std::all_of(fibres+i, fibres+i+size, [&](Fibre& f) { return f.wait == w; })) { for (int j = 0; j < size; j++) fibres[i+j].wait = NONE; any = true; }
    return any;
}
extern "C" int run(const void** t, int B, int n, int mala, float drift, int seed) { // 1: everyone waits, for different things
    std::copy(t, t+11, tensors); numbers[0] = B; numbers[1] = n; numbers[2] = mala; longest = drift;
    std::mt19937 rng(seed); std::vector<int> order(ALL); static std::vector<char> stacks((size_t)ALL*STACK);
    for (int i = 0; i < ALL; i++) order[i] = i;
    for (cluster = 0; cluster < (B+BLOCKS-1)/BLOCKS; cluster++) {
        for (auto& s : shared) s.assign(FLOATS, NAN); // nothing may be read before it is written
        for (int i = 0; i < ALL; i++) {
            Fibre& f = fibres[i]; f.wait = NONE; f.begun = false; f.swaps = 0; getcontext(&f.context); f.context.uc_link = &nowhere;
            f.context.uc_stack.ss_sp = &stacks[(size_t)i*STACK]; f.context.uc_stack.ss_size = STACK; makecontext(&f.context, go, 0);
        }
        while (!std::all_of(fibres, fibres+ALL, [](Fibre& f) { return f.wait == DONE; })) {
            bool moved = false, held[BLOCKS]; for (bool& h : held) h = rng()%4 != 0;
            std::shuffle(order.begin(), order.end(), rng);
            for (int i : order) if (fibres[i].wait == NONE) { moved = true; if (!held[i/PER]) { now = i; resume(fibres[i]); } }
            if (!(release(WARP, 32) | release(BLOCK, PER) | release(CLUSTER, ALL) | moved)) return 1;
        }
    }
    return 0;
}
