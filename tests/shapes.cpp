// Chains of networks of random shapes, for a compiler that looks at every access: appended to the source of `ldebm.native`
#include <cstdio>
#include <cstdlib>
static real* some(size_t n) { // exactly as large as promised
    real* p = (real*)malloc(std::max<size_t>(n, 1)*sizeof(real));
    for (size_t i = 0; i < n; i++) p[i] = (rand()%1000-500)/(real)1000;
    return p;
}
int main() {
    for (int seed = 0; seed < 20; seed++) {
        srand(seed);
        const int d = 1+rand()%50, H = 1+rand()%70, K = 1+rand()%40, N = rand()%5, B = seed%5 ? rand()%201 : 0, n = rand()%4, mala = rand()%2, threads = 1+rand()%3, L = N+2;
        real *w = some((size_t)L*H*(H+1) + (d+1)*H + (H+1)*K), *base = some((size_t)B*H), *start = some(B*d), *means = some(B*d), *rows = some(6*B), *noise = some((size_t)n*B*d), *uniform = some(n*B);
        real *out = some(B*d), *seen = some((n+mala)*B), *slope = some((n+mala)*B), *accepted = some(B);
        int64_t* symbols = (int64_t*)malloc(std::max(B, 1)*sizeof(int64_t)); for (int i = 0; i < B; i++) symbols[i] = rand()%K;
        const long bytes = packed_bytes(d, H, K, N); char* packed = (char*)aligned_alloc(64, (bytes+63)/64*64);
        pack(d, H, K, N, threads, nullptr, w, packed);
        chains(d, H, K, N, .2, B, n, mala, rand()%2 ? .5 : 1e300, threads, nullptr, packed, base, start, means, rows, noise, uniform, seed%3 ? nullptr : symbols, out, seen, slope, accepted);
        gradient(d, H, K, N, .2, B, threads, nullptr, packed, base, start, seed%3 ? nullptr : symbols, accepted, out);
        free(packed); free(symbols); for (real* p : {w, base, start, means, rows, noise, uniform, out, seen, slope, accepted}) free(p);
    }
    puts("nothing found");
}
