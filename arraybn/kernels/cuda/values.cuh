// What all kernels are made of: the parameters of a launch, the four types of values, loads and stores, sums over a
// block, and how the last of several blocks is found.
//
// Plain CUDA C++ without an #include, so that a kernel compiles in a tenth of a second. launch.py puts this file
// before the others. tests/cuda/shim.h gives the same words a meaning on a CPU: it defines ON_CPU, and what stands
// under #ifndef ON_CPU here.
//
// Multiplications and additions are fused where fma() is written and nowhere else (the option -fmad=false), so the
// bits are the same whoever compiles.

typedef unsigned char uint8;
typedef unsigned short uint16;
typedef unsigned int uint32;
typedef unsigned long long uint64;
typedef long long int64;

#define DEVICE __device__ __forceinline__
enum { MOST_THREADS = 256, WARP = 32 };

// ---- The parameters of a launch -------------------------------------------------------------------------------------

// v / d for v < 2^63 without dividing: the high half of a product, shifted; a multiplier of 0 is a power of two.
struct Divisor {
    uint64 multiplier;
    int64 shift;
};

// Every field has 8 bytes; POINTERS, FLOATS and NUMBERS in launch.py are the same list. An optional pointer is null
// where its array is not given.
struct Parameters {
    const void* x;   // (N, C, S)
    const void* u;   // (N, C, S): dy in a backward
    void* out;       // (N, C, S)
    double* mean;    // (C,), and so are the next
    double* m2;
    double* rstd;    // null: a plain sweep, without the formulas
    const double* shift;
    const void* weight;  // of `parameter_kind`
    const void* bias;
    double* kept_weight;  // null, or where a forward keeps the weight for its backward
    double* dweight;  // or the sum of u * (x - mean) in a plain sweep
    double* dbias;    // or the sum of u
    const double* a;  // the coefficients of a plain sweep
    const double* b;
    const double* c;
    const double* d;
    const void* v;     // (N, C, S): the third input, of affine3
    const uint8* where;  // (N, S): 0 for a position that is no part of the batch; not read by kernels without a mask
    const void* first;   // (C,) of `state_kind`: the running mean before this batch, or the gradient of weight or null
    const void* second;  // the running var, or the gradient of bias or null
    void* new_first;     // the same after this batch; null where it is not asked for
    void* new_second;
    double* partials;  // for each group of channels and each of its parts, a Pair for each channel
    uint32* tickets;   // for each group; zero before and after a launch
    double eps;
    double momentum;
    int64 n;         // values of a channel
    int64 channels;
    int64 groups;    // of channels, each the work of its own blocks
    int64 parts;     // blocks for a group
    int64 items;     // items of a channel (planes), or rows (lines)
    int64 part;      // of them in a part
    int64 plane;     // items in a plane; in the maps of planes by the ring, values
    int64 stride;    // values from a plane to the next of the same channel, or from a row to the next
    int64 columns;   // threads side by side in a row (lines); a power of two
    int64 ahead;     // tasks summed before the first is mapped (fused.cu); stages of the ring; pieces of a warp
    int64 parameter_kind;  // the type of weight and bias: 0 float64, 1 float32, 2 float16, 3 bfloat16
    int64 state_kind;      // the same of first and second: 0 or 1
    Divisor by_groups;
    Divisor by_plane;
};

// ---- Accesses and conversions that C++ has no words for -------------------------------------------------------------

struct alignas(16) Pair {
    double first;
    double second;
};

template <int BYTES>
struct alignas(BYTES) Words {
    uint32 word[BYTES / 4];
};

#ifndef ON_CPU

#define SHARED(type, name, count) __shared__ type name[count]
#define DYNAMIC_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
// Two blocks of 256 threads fit into a multiprocessor: 128 registers for a thread.
#define BOUNDS __launch_bounds__(MOST_THREADS, 2)
#define ENTRY(kernel, type, width)                                                                                     \
    extern "C" __global__ void BOUNDS kernel##_##type##_##width(const __grid_constant__ Parameters p) {                \
        kernel<type, width>(p);                                                                                        \
    }
#define CLUSTER_KERNEL(kernel, type, width, blocks)                                                                    \
    extern "C" __global__ void __cluster_dims__(blocks, 1, 1)                                                          \
        BOUNDS kernel##_##type##_##width(const __grid_constant__ Parameters p) {                                       \
        kernel<type, width>(p);                                                                                        \
    }

DEVICE void load(const void* from, Words<16>& to) {
    asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
                 : "l"(from));
}
DEVICE void load(const void* from, Words<8>& to) {
    asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(to.word[0]), "=r"(to.word[1]) : "l"(from));
}

// Past the cache of the data that is still to be read.
DEVICE void store(void* to, const Words<16>& from) {
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(from.word[0]), "r"(from.word[1]),
                 "r"(from.word[2]), "r"(from.word[3])
                 : "memory");
}
DEVICE void store(void* to, const Words<8>& from) {
    asm volatile("st.global.cs.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(from.word[0]), "r"(from.word[1]) : "memory");
}

// Where the cache has room, for whoever reads it next.
DEVICE void store_near(void* to, const Words<16>& from) {
    asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(from.word[0]), "r"(from.word[1]),
                 "r"(from.word[2]), "r"(from.word[3])
                 : "memory");
}
DEVICE void store_near(void* to, const Words<8>& from) {
    asm volatile("st.global.v2.u32 [%0], {%1, %2};" ::"l"(to), "r"(from.word[0]), "r"(from.word[1]) : "memory");
}

// What another block wrote: from the cache that all share, never from that of this multiprocessor.
DEVICE Pair load_shared(const Pair* from) {
    Pair to;
    asm volatile("ld.global.cg.v2.f64 {%0, %1}, [%2];" : "=d"(to.first), "=d"(to.second) : "l"(from) : "memory");
    return to;
}

// Copies into shared memory that arrive later, in rounds; 2 bytes are copied at once, and all on GPUs before the A100.
// LAST: for the last time, so that the place in the cache is free.
template <int BYTES, bool LAST>
DEVICE void copy_later(void* to, const void* from) {
#if __CUDA_ARCH__ < 800
    for (int i = 0; i < BYTES / 2; ++i) ((uint16*)to)[i] = ((const uint16*)from)[i];
#else
    if constexpr (BYTES == 2) {
        *(uint16*)to = *(const uint16*)from;
    } else {
        uint64 address;
        asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(to));
        if constexpr (LAST) {
            uint64 policy;
            asm("createpolicy.fractional.L2::evict_first.b64 %0;" : "=l"(policy));
            if constexpr (BYTES == 16) {
                asm volatile("cp.async.cg.shared.global.L2::cache_hint [%0], [%1], 16, %2;" ::"r"((uint32)address),
                             "l"(from), "l"(policy)
                             : "memory");
            } else {
                asm volatile("cp.async.ca.shared.global.L2::cache_hint [%0], [%1], %2, %3;" ::"r"((uint32)address),
                             "l"(from), "n"(BYTES), "l"(policy)
                             : "memory");
            }
        } else if constexpr (BYTES == 16) {
            asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"((uint32)address), "l"(from) : "memory");
        } else {
            asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"((uint32)address), "l"(from), "n"(BYTES)
                         : "memory");
        }
    }
#endif
}
#if __CUDA_ARCH__ < 800
DEVICE void end_round() {}
template <int ROUNDS> DEVICE void wait_for_rounds() {}
#else
DEVICE void end_round() { asm volatile("cp.async.commit_group;" ::: "memory"); }
// Until all of this thread's rounds have arrived, but for the last ROUNDS.
template <int ROUNDS>
DEVICE void wait_for_rounds() {
    asm volatile("cp.async.wait_group %0;" ::"n"(ROUNDS) : "memory");
}
#endif

// A flag between blocks: who sees it set sees what was written before.
DEVICE void store_release(uint32* to, uint32 value) {
    asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(to), "r"(value) : "memory");
}
DEVICE uint32 load_acquire(const uint32* from) {
    uint32 value;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(from) : "memory");
    return value;
}

// Bulk copies into shared memory, of a multiple of 16 bytes, and the barriers on which they arrive: Hopper and later.
// A barrier is in phase 0, then 1, then 0 and so on; a phase ends when `arrivals` have arrived and all expected bytes
// are there.
#if __CUDA_ARCH__ >= 900
DEVICE uint32 shared_address(const void* place) {
    uint64 address;
    asm("cvta.to.shared.u64 %0, %1;" : "=l"(address) : "l"(place));
    return (uint32)address;
}
DEVICE void begin_barrier(uint64* barrier, uint32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
DEVICE void fence_barriers() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
// Orders what this thread did to shared memory before bulk copies that are asked for later.
DEVICE void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void expect_bytes(uint64* barrier, uint32 bytes) {  // and arrives
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(bytes)
                 : "memory");
}
DEVICE void arrive(uint64* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(barrier)) : "memory");
}
// Until the phase of that parity has ended.
DEVICE void wait_for_phase(uint64* barrier, uint32 parity) {
    uint32 ended;
    do {
        asm volatile(
            "{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\nselp.u32 %0, 1, 0, p;\n}"
            : "=r"(ended)
            : "r"(shared_address(barrier)), "r"(parity)
            : "memory");
    } while (!ended);
}
DEVICE void copy_bulk(void* to, const void* from, int bytes, uint64* barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(
                     shared_address(to)),
                 "l"(from), "r"(bytes), "r"(shared_address(barrier))
                 : "memory");
}

// Blocks of a cluster, which run at the same time: the number of this block among them, and how many they are.
DEVICE uint32 cluster_rank() {
    uint32 rank;
    asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return rank;
}
DEVICE uint32 cluster_blocks() {
    uint32 blocks;
    asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(blocks));
    return blocks;
}
// Who has waited sees what all threads of the cluster wrote before.
DEVICE void wait_for_cluster() {
    __syncwarp();
    asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Stores into the shared memory of another block of the cluster, where this block has `place`.
DEVICE void store_in_block(uint32 rank, Pair* place, Pair value) {
    uint32 address;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(address) : "r"(shared_address(place)), "r"(rank));
    asm volatile("st.shared::cluster.v2.f64 [%0], {%1, %2};" ::"r"(address), "d"(value.first), "d"(value.second)
                 : "memory");
}
#else  // never called: `_cut_rows` chooses no ring there
DEVICE void begin_barrier(uint64*, uint32) {}
DEVICE void fence_barriers() {}
DEVICE void fence_async() {}
DEVICE void expect_bytes(uint64*, uint32) {}
DEVICE void arrive(uint64*) {}
DEVICE void wait_for_phase(uint64*, uint32) {}
DEVICE void copy_bulk(void*, const void*, int, uint64*) {}
#endif
// A barrier of the first MOST_THREADS threads of a block.
DEVICE void wait_for_consumers() { asm volatile("bar.sync 1, %0;" ::"n"((int)MOST_THREADS) : "memory"); }

// Subnormal float32 stay what they are, whatever the option -ftz says.
DEVICE double float_to_double(float value) {
    double wide;
    asm("cvt.f64.f32 %0, %1;" : "=d"(wide) : "f"(value));
    return wide;
}
DEVICE float double_to_float(double value) {
    float narrow;
    asm("cvt.rn.f32.f64 %0, %1;" : "=f"(narrow) : "d"(value));
    return narrow;
}

DEVICE float half_to_float(uint16 half) {
    float value;
    asm("cvt.f32.f16 %0, %1;" : "=f"(value) : "h"(half));
    return value;
}
DEVICE uint16 float_to_half(float value) {
    uint16 half;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(half) : "f"(value));
    return half;
}
#if __CUDA_ARCH__ >= 800
DEVICE uint16 float_to_bfloat(float value) {
    uint16 bfloat;
    asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(bfloat) : "f"(value));
    return bfloat;
}
// Two at once; the first is the lower half of the word.
DEVICE uint32 floats_to_halves(float first, float second) {
    uint32 word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
DEVICE uint32 floats_to_bfloats(float first, float second) {
    uint32 word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(second), "f"(first));
    return word;
}
#else  // older than the A100
DEVICE uint16 float_to_bfloat(float value) {
    const uint32 bits = __float_as_uint(value);
    return (uint16)(value != value ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
DEVICE uint32 floats_to_halves(float first, float second) {
    return float_to_half(first) | (uint32)float_to_half(second) << 16;
}
DEVICE uint32 floats_to_bfloats(float first, float second) {
    return float_to_bfloat(first) | (uint32)float_to_bfloat(second) << 16;
}
#endif

#endif  // ON_CPU

DEVICE float bits_to_float(uint32 bits) {
    union { uint32 bits; float value; } either;
    either.bits = bits;
    return either.value;
}
DEVICE uint32 float_to_bits(float value) {
    union { uint32 bits; float value; } either;
    either.value = value;
    return either.bits;
}
DEVICE double words_to_double(uint32 low, uint32 high) {
    union { uint64 bits; double value; } either;
    either.bits = low | (uint64)high << 32;
    return either.value;
}
DEVICE uint64 double_to_bits(double value) {
    union { uint64 bits; double value; } either;
    either.value = value;
    return either.bits;
}

DEVICE int64 divide(int64 value, const Divisor& by) {
    return (int64)(by.multiplier ? __umul64hi((uint64)value, by.multiplier) >> by.shift : (uint64)value >> by.shift);
}

DEVICE bool is_finite(double value) { return value - value == 0; }

DEVICE float fused(float a, float b, float c) { return fmaf(a, b, c); }
DEVICE double fused(double a, double b, double c) { return fma(a, b, c); }

// ---- The four types -------------------------------------------------------------------------------------------------
// Stored: what lies in memory. Value: what the maps calculate with. Summed: what a few values are summed up in, before
// the sums are added to a float64.

struct float32 {
    typedef float Stored;
    typedef float Value;
    typedef double Summed;
    DEVICE static Value value(Stored stored) { return stored; }
    DEVICE static Stored rounded(Value value) { return value; }
    DEVICE static Value nth(const uint32* word, int i) { return bits_to_float(word[i]); }
    template <int WIDTH> DEVICE static void pack(const Value* value, uint32* word) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) word[i] = float_to_bits(value[i]);
    }
};

struct float64 {
    typedef double Stored;
    typedef double Value;
    typedef double Summed;
    DEVICE static Value value(Stored stored) { return stored; }
    DEVICE static Stored rounded(Value value) { return value; }
    DEVICE static Value nth(const uint32* word, int i) { return words_to_double(word[2 * i], word[2 * i + 1]); }
    template <int WIDTH> DEVICE static void pack(const Value* value, uint32* word) {
#pragma unroll
        for (int i = 0; i < WIDTH; ++i) {
            word[2 * i] = (uint32)double_to_bits(value[i]);
            word[2 * i + 1] = (uint32)(double_to_bits(value[i]) >> 32);
        }
    }
};

struct float16 {
    typedef uint16 Stored;
    typedef float Value;
    typedef float Summed;
    DEVICE static Value value(Stored stored) { return half_to_float(stored); }
    DEVICE static Stored rounded(Value value) { return float_to_half(value); }
    DEVICE static Value nth(const uint32* word, int i) { return half_to_float((uint16)(word[i / 2] >> i % 2 * 16)); }
    template <int WIDTH> DEVICE static void pack(const Value* value, uint32* word) {
#pragma unroll
        for (int i = 0; i < WIDTH; i += 2) word[i / 2] = floats_to_halves(value[i], value[i + 1]);
    }
};

struct bfloat16 {
    typedef uint16 Stored;
    typedef float Value;
    typedef float Summed;
    DEVICE static Value value(Stored stored) { return bits_to_float((uint32)stored << 16); }
    DEVICE static Stored rounded(Value value) { return float_to_bfloat(value); }
    DEVICE static Value nth(const uint32* word, int i) {
        return bits_to_float(i % 2 ? word[i / 2] & 0xffff0000u : word[i / 2] << 16);
    }
    template <int WIDTH> DEVICE static void pack(const Value* value, uint32* word) {
#pragma unroll
        for (int i = 0; i < WIDTH; i += 2) word[i / 2] = floats_to_bfloats(value[i], value[i + 1]);
    }
};

// The value of a vector (C,) of a kind, as struct Parameters numbers the types.
DEVICE double value_of(const void* vector, int64 kind, int64 channel) {
    if (kind == 0) return ((const double*)vector)[channel];
    if (kind == 1) return (double)((const float*)vector)[channel];
    const uint16 stored = ((const uint16*)vector)[channel];
    return (double)(kind == 2 ? float16::value(stored) : bfloat16::value(stored));
}

// WIDTH values side by side, as they are loaded and stored at once. UNROLL such items are under way at a time.
template <class T, int WIDTH>
struct Item {
    typedef typename T::Stored Stored;
    enum { UNROLL = 4 };
    Words<WIDTH * (int)sizeof(Stored)> words;

    DEVICE void load(const Stored* from) { ::load(from, words); }
    DEVICE void store(Stored* to) const { ::store(to, words); }
    DEVICE void store_near(Stored* to) const { ::store_near(to, words); }
    DEVICE typename T::Value operator[](int i) const { return T::nth(words.word, i); }
    DEVICE void set(const typename T::Value* value) { T::template pack<WIDTH>(value, words.word); }
};

template <class T>
struct Item<T, 1> {
    typedef typename T::Stored Stored;
    enum { UNROLL = 8 };
    Stored stored;

    DEVICE void load(const Stored* from) { stored = *from; }
    DEVICE void store(Stored* to) const { *to = stored; }
    DEVICE void store_near(Stored* to) const { *to = stored; }
    DEVICE typename T::Value operator[](int) const { return T::value(stored); }
    DEVICE void set(const typename T::Value* value) { stored = T::rounded(*value); }
};

// The mask of WIDTH positions side by side, as it is loaded at once; true where the position counts.
template <int BYTES> struct Loaded;
template <> struct Loaded<1> { typedef uint8 Word; };
template <> struct Loaded<2> { typedef uint16 Word; };
template <> struct Loaded<4> { typedef uint32 Word; };
template <> struct Loaded<8> { typedef uint64 Word; };

template <int WIDTH>
struct Marks {
    typedef typename Loaded<WIDTH>::Word Word;
    Word word;

    DEVICE void load(const uint8* where, int64 item) { word = ((const Word*)where)[item]; }
    DEVICE bool operator[](int i) const { return (word >> 8 * i & 0xff) != 0; }
};

// ---- Sums over a block, and the last block of several ---------------------------------------------------------------

// Sums s and q over the threads whose numbers are equal modulo `columns`, a power of two; each thread gets the sums of
// its own column. All threads of the block must be here. `room` has a place for each thread.
DEVICE void sum_over_block(double& s, double& q, int columns, Pair* room) {
    const int thread = threadIdx.x, threads = blockDim.x;
    for (int step = WARP / 2; step >= columns; step /= 2) {
        s += __shfl_xor_sync(0xffffffffu, s, step);
        q += __shfl_xor_sync(0xffffffffu, q, step);
    }
    // Now a warp has one sum for each column, or it has several columns and no sums yet.
    const int lane = thread % WARP, rows = columns < WARP ? threads / WARP : threads / columns;
    if (columns >= WARP || lane < columns) {
        Pair& place = room[columns < WARP ? thread / WARP * columns + lane : thread];
        place.first = s;
        place.second = q;
    }
    __syncthreads();
    s = q = 0;
    for (int row = 0; row < rows; ++row) {
        const Pair& place = room[row * columns + thread % columns];
        s += place.first;
        q += place.second;
    }
    __syncthreads();  // before the room is used again
}

// The least value of all threads of the block, which must be here. `room` has a place for each warp.
DEVICE uint32 least_of_block(uint32 value, uint32* room) {
    for (int step = WARP / 2; step > 0; step /= 2) {
        const uint32 other = __shfl_xor_sync(0xffffffffu, value, step);
        value = other < value ? other : value;
    }
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = value;
    __syncthreads();
    for (int warp = 0; warp < (int)blockDim.x / WARP; ++warp) value = room[warp] < value ? room[warp] : value;
    __syncthreads();  // before the room is used again
    return value;
}

// Whether this block is the last of `parts` to come here; it then sees what the others wrote before they came, and
// leaves the counter at zero. All threads of the block must be here. The barrier orders what they wrote before the
// fence of thread 0, and the fence before its ticket.
DEVICE bool last_to_arrive(uint32* tickets, int64 parts, uint32* room) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        const uint32 ticket = atomicAdd(tickets, 1u);
        if (ticket == parts - 1) *tickets = 0;
        __threadfence();
        *room = ticket;
    }
    __syncthreads();
    return *room == parts - 1;
}

// Draws a ticket below `limit` for the block; false where there are no more. All threads of the block must be here.
DEVICE bool draw(uint32* drawn, uint32 limit, uint32* ticket) {
    __syncthreads();  // all have read the last one
    if (threadIdx.x == 0) *ticket = atomicAdd(drawn, 1u);
    __syncthreads();
    return *ticket < limit;
}

// Counts this block, when all its threads are here, for those who wait; they then see what the block wrote.
DEVICE void count_up(uint32* counter) {
    __syncthreads();
    if (threadIdx.x == 0) {
        __threadfence();
        atomicAdd(counter, 1u);
    }
}
// Lets each warp wait until the count is reached.
DEVICE void wait_until(const uint32* counter, uint32 count) {
    if (threadIdx.x % WARP == 0) {
        while (load_acquire(counter) < count) __nanosleep(64);
    }
    __syncwarp();
}
