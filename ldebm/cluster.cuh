// What a GPU of capability 9 or 10 offers: clusters of sixteen blocks that write each other's shared memory
#define DEVICE __device__ __forceinline__
#define KERNEL extern "C" __global__ void __cluster_dims__(16, 1, 1) __launch_bounds__(256, 1)
extern __shared__ __align__(16) float shared_memory[];
DEVICE float* memory() {
    return shared_memory;
}
DEVICE int thread() {
    return threadIdx.x;
}
DEVICE int cluster_id() {
    return blockIdx.x / 16;
}
DEVICE int cluster_rank() {
    unsigned r;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(r));
    return r;
}
DEVICE void block_sync() {
    __syncthreads();
}
DEVICE void cluster_sync() {
    asm volatile("barrier.cluster.arrive.release;\nbarrier.cluster.wait.acquire;" ::: "memory");
}
DEVICE unsigned at(const float* p, int rank) {
    unsigned a;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(a) : "r"((unsigned)__cvta_generic_to_shared(p)), "r"(rank));
    return a;
}
DEVICE void put(float* p, int rank, float x) {
    asm volatile("st.shared::cluster.f32 [%0], %1;" ::"r"(at(p, rank)), "f"(x) : "memory");
}
DEVICE void put4(float* p, int rank, float4 x) {
    asm volatile("st.shared::cluster.v4.f32 [%0], {%1,%2,%3,%4};" ::"r"(at(p, rank)), "f"(x.x), "f"(x.y), "f"(x.z),
                 "f"(x.w)
                 : "memory");
}
DEVICE float swap8(float x) {
    return __shfl_xor_sync(0xffffffffu, x, 8);
}  // with the thread whose number differs by 8
