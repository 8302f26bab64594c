// Runs CUDA kernels on a CPU: the kernels' source is included after this file and compiled by g++.
//
// Each CUDA thread is a fiber with a stack of its own; one thread of the operating system switches between them where
// they wait for each other, in a fixed order. Some blocks are alive at a time (`resident`), so that blocks may wait for
// each other too; the blocks of a cluster begin together. What it finds: wrong indices and tails, threads that miss a
// barrier, misaligned accesses, counters that are not reset, results that depend on the order of blocks. What it cannot
// find: races, missing fences, errors in PTX, and how fast it is.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <utility>
#include <vector>
#if defined(__x86_64__) && !defined(UCONTEXT)
#include <xmmintrin.h>
#define SWITCH_BY_HAND
#else
#include <ucontext.h>
#endif

#define ON_CPU

namespace shim {

struct Index { unsigned x, y, z; };
struct Barrier { unsigned arrived = 0, passed = 0; };

struct Warp {
    Barrier barrier;
    unsigned lanes = 0;
    uint64_t value[2][32];  // of this shuffle and the next
};

struct Block {
    Index index{};
    unsigned alive = 0;
    bool begun = false;  // some thread has
    Barrier barrier, of_consumers, of_cluster;
    Block* first = nullptr;  // of its cluster
    std::vector<Warp> warps;
    size_t used = 0;  // of the shared memory
    std::vector<unsigned char> shared;
    std::vector<unsigned char> dynamic;  // shared memory whose size the launch says
    std::vector<std::pair<const void*, size_t>> sites;  // the declarations of shared memory, and where each has it
};

// A copy into shared memory, which is not there before its round is waited for.
struct Copy {
    void* to;
    const void* from;
    size_t bytes;
    unsigned round;
};

// A bulk copy, which arrives when somebody waits on its barrier.
struct Bulk {
    const Block* block;
    void* to;
    const void* from;
    size_t bytes;
    uint64_t* barrier;
};

struct Fiber {
    void* place = nullptr;  // its stack pointer, or its context
    char* stack = nullptr;
    Block* block = nullptr;
    Index index{};
    std::vector<Copy> copies;
    unsigned rounds = 0;  // of copies
    const Barrier* waits = nullptr;
    unsigned until = 0;  // passed is more than this
    bool done = false;
};

const size_t STACK = 1 << 16, SHARED = 1 << 16;
const unsigned long PATIENCE = 2000;   // rounds without an end to any wait

inline Fiber* now;
inline Index grid, block_size;
inline unsigned cluster;  // blocks in a cluster
inline void (*kernel)(const void*);
inline const void* parameters;
inline char failure[200];
inline bool progress;
inline std::vector<Bulk> bulks;  // that have not arrived
inline bool at_once;  // copies arrive when they are asked for, otherwise when they are waited for

// ---- Switching ------------------------------------------------------------------------------------------------------

#if defined(SWITCH_BY_HAND)

// Keeps the registers that a function must keep, and goes on with another stack.
extern "C" void shim_switch(void** from, void* to);
asm(".text\n.globl shim_switch\n.hidden shim_switch\n.type shim_switch, @function\nshim_switch:\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
inline void* scheduler;
inline void leave() { shim_switch(&now->place, scheduler); }
inline void enter(Fiber* fiber) { now = fiber; shim_switch(&scheduler, fiber->place); }
inline void prepare(Fiber* fiber, void (*entry)()) {
    void** top = (void**)(((uintptr_t)fiber->stack + STACK) & ~(uintptr_t)15);
    *--top = nullptr;  // where a caller's address would be
    *--top = (void*)entry;
    for (int i = 0; i < 6; ++i) *--top = nullptr;
    fiber->place = top;
}

#else

inline ucontext_t scheduler;
inline void leave() { swapcontext((ucontext_t*)now->place, &scheduler); }
inline void enter(Fiber* fiber) { now = fiber; swapcontext(&scheduler, (ucontext_t*)fiber->place); }
inline void prepare(Fiber* fiber, void (*entry)()) {
    ucontext_t* context = fiber->place ? (ucontext_t*)fiber->place : new ucontext_t;
    getcontext(context);
    context->uc_stack.ss_sp = fiber->stack;
    context->uc_stack.ss_size = STACK;
    context->uc_link = nullptr;
    makecontext(context, entry, 0);
    fiber->place = context;
}

#endif

// Ends the launch: the scheduler does not come back to any fiber.
inline void fail(const char* what) {
    snprintf(failure, sizeof failure, "block %u, thread %u: %s", now->block->index.x, now->index.x, what);
    for (;;) leave();
}

inline void run_thread() {
    now->block->begun = true;
    kernel(parameters);
    now->done = true;
    --now->block->alive;
    progress = true;
    for (;;) leave();
}

// ---- Waiting --------------------------------------------------------------------------------------------------------

inline void wait(Barrier& barrier, unsigned threads) {
    if (++barrier.arrived == threads) {
        barrier.arrived = 0;
        ++barrier.passed;
        progress = true;
        return;
    }
    now->waits = &barrier;
    now->until = barrier.passed;
    leave();
}

inline Warp& warp() { return now->block->warps[now->index.x / 32]; }

template <class T>
T from_lane(T value, unsigned lane) {
    static_assert(sizeof(T) <= 8, "shuffles are of 8 bytes at most");
    Warp& w = warp();
    uint64_t* values = w.value[w.barrier.passed & 1];  // a lane that is one shuffle ahead writes into the other
    memcpy(&values[now->index.x % 32], &value, sizeof(T));
    wait(w.barrier, w.lanes);
    if (lane >= w.lanes) fail("a shuffle from a lane that is not there");
    memcpy(&value, &values[lane], sizeof(T));
    return value;
}

// The block's shared memory that is declared at a site: the same for every thread, each time.
inline void* shared(const void* site, size_t bytes) {
    Block& block = *now->block;
    for (const auto& known : block.sites) {
        if (known.first == site) return block.shared.data() + known.second;
    }
    block.sites.push_back({site, block.used});
    block.used += (bytes + 15) & ~(size_t)15;
    if (block.used > SHARED) fail("too much shared memory");
    return block.shared.data() + block.sites.back().second;
}

// What has arrived when all but the last `rounds` rounds are there.
inline void finish_copies(unsigned rounds) {
    size_t left = 0;
    for (const Copy& copy : now->copies) {
        if (copy.round + rounds < now->rounds) memcpy(copy.to, copy.from, copy.bytes);
        else now->copies[left++] = copy;
    }
    now->copies.resize(left);
}

// ---- Barriers in shared memory, and bulk copies that arrive on them -------------------------------------------------

struct Phase {  // the 8 bytes of a barrier
    uint8_t parity, arrivals, left, known;
    int32_t bytes;  // expected, less those that are there
};
const uint8_t KNOWN = 0x5a;

inline Phase& phase_of(uint64_t* barrier) {
    Phase& phase = *(Phase*)barrier;
    if (phase.known != KNOWN) fail("a barrier that has not begun");
    return phase;
}
inline void end_phase(Phase& phase) {
    if (phase.left || phase.bytes) return;
    phase.parity ^= 1;
    phase.left = phase.arrivals;
    progress = true;
}
inline void arrive_at(uint64_t* barrier, uint32_t bytes) {
    Phase& phase = phase_of(barrier);
    if (!phase.left) fail("one arrival too many");
    --phase.left;
    phase.bytes += (int32_t)bytes;
    end_phase(phase);
}
inline void finish_bulks(uint64_t* barrier) {
    size_t left = 0;
    for (size_t i = 0; i < bulks.size(); ++i) {
        const Bulk bulk = bulks[i];
        if (bulk.barrier != barrier) {
            bulks[left++] = bulk;
            continue;
        }
        memcpy(bulk.to, bulk.from, bulk.bytes);
        phase_of(barrier).bytes -= (int32_t)bulk.bytes;
    }
    bulks.resize(left);
    end_phase(phase_of(barrier));
}

// ---- A launch -------------------------------------------------------------------------------------------------------

struct Launch {
    std::vector<Block> blocks;
    std::vector<Fiber> fibers;
    std::vector<uint64_t> order;

    Launch(unsigned threads, unsigned resident, size_t dynamic)  // resident blocks are whole clusters
        : blocks(resident), fibers((size_t)threads * resident) {
        for (size_t i = 0; i < fibers.size(); ++i) fibers[i].stack = stack(i);
        for (Block& block : blocks) {
            block.shared.assign(SHARED, 0xff);  // NaN
            block.dynamic.assign(dynamic, 0xff);
        }
    }

    // The i-th stack; they are kept from launch to launch.
    static char* stack(size_t i) {
        static std::vector<char*> stacks;
        while (stacks.size() <= i) stacks.push_back((char*)malloc(STACK));
        return stacks[i];
    }

    // Begins the blocks of a cluster at places side by side.
    void begin_cluster(unsigned place, uint64_t index) {
        for (unsigned rank = 0; rank < cluster; ++rank) begin(place + rank, index * cluster + rank, &blocks[place]);
    }

    void begin(unsigned place, uint64_t index, Block* first) {
        Block& block = blocks[place];
        block.first = first;
        block.begun = false;
        const unsigned threads = block_size.x;
        block.index = {(unsigned)index, 0, 0};
        block.alive = threads;
        block.barrier = block.of_consumers = block.of_cluster = Barrier();
        block.warps.assign((threads + 31) / 32, Warp());
        for (unsigned t = 0; t < threads; ++t) ++block.warps[t / 32].lanes;
        memset(block.shared.data(), 0xff, block.used);
        block.dynamic.assign(block.dynamic.size(), 0xff);
        block.used = 0;
        block.sites.clear();
        for (unsigned t = 0; t < threads; ++t) {
            Fiber& fiber = fibers[(size_t)place * threads + t];
            fiber.block = &block;
            fiber.index = {t, 0, 0};
            fiber.copies.clear();
            fiber.rounds = 0;
            fiber.waits = nullptr;
            fiber.done = false;
            prepare(&fiber, run_thread);
        }
    }

    // One turn of each thread of a block. Where copies arrive at once, the last warp is ahead of the others, and a
    // block of a cluster goes on until it has to wait, so that it is ahead of the blocks that come after it.
    void turn(unsigned place) {
        const unsigned threads = block_size.x;
        const bool before = progress;
        do {
            progress = false;
            for (int i = 0; at_once && threads > 32 && i < 16; ++i) turn(place, (threads - 1) / 32 * 32);
            turn(place, 0);
        } while (at_once && cluster > 1 && progress && blocks[place].alive);
        progress = progress || before;
    }

    bool alive(unsigned place) const {  // a block of the cluster
        for (unsigned rank = 0; rank < cluster; ++rank) {
            if (blocks[place + rank].alive) return true;
        }
        return false;
    }

    // One turn of each thread from the `first` on that has something to do.
    void turn(unsigned place, unsigned first) {
        const unsigned threads = block_size.x;
        for (unsigned t = first; t < threads && !*failure; ++t) {
            Fiber& fiber = fibers[(size_t)place * threads + t];
            if (fiber.done || (fiber.waits && fiber.waits->passed == fiber.until)) continue;
            fiber.waits = nullptr;
            enter(&fiber);
        }
    }

    void run(uint64_t total) {
        uint64_t next = 0;
        unsigned long idle = 0;
        for (unsigned place = 0; place < blocks.size() && next < total; place += cluster) {
            begin_cluster(place, order[next++]);
        }
        for (bool any = true; any && !*failure;) {
            any = progress = false;
            for (unsigned place = 0; place < blocks.size(); ++place) {
                if (blocks[place].alive) turn(place);
                const unsigned first = place - place % cluster;
                if (place - first == cluster - 1 && !alive(first) && next < total) begin_cluster(first, order[next++]);
                any = any || alive(first);
            }
            idle = progress ? 0 : idle + 1;
            if (idle > PATIENCE || (idle > 1 && stuck())) snprintf(failure, sizeof failure, "threads wait for ever");
        }
    }

    bool stuck() const {
        for (const Fiber& fiber : fibers) {
            if (fiber.block && !fiber.done && !(fiber.waits && fiber.waits->passed == fiber.until)) return false;
        }
        return true;
    }
};

// The order in which blocks or clusters begin: as they are numbered, backwards, or shuffled by a seed.
inline void put_in_order(std::vector<uint64_t>& order, uint64_t blocks, unsigned seed) {
    order.resize(blocks);
    for (uint64_t i = 0; i < blocks; ++i) order[i] = seed == 1 ? blocks - 1 - i : i;
    if (seed < 2) return;
    uint64_t state = seed;
    for (uint64_t i = blocks; i > 1; --i) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        std::swap(order[i - 1], order[(state >> 33) % i]);
    }
}

}  // namespace shim

// Runs a kernel; returns null, or what went wrong.
extern "C" const char* shim_launch(
    void (*kernel)(const void*), const void* parameters, unsigned blocks, unsigned threads, unsigned dynamic,
    unsigned resident, unsigned seed, unsigned of_cluster) {
    using namespace shim;
    shim::kernel = kernel;
    shim::parameters = parameters;
    grid = {blocks, 1, 1};
    block_size = {threads, 1, 1};
    cluster = of_cluster;
    *failure = 0;
    if (!cluster || blocks % cluster) return "the blocks are not whole clusters";
    resident = std::max(resident / cluster, 1u) * cluster;
    bulks.clear();
    at_once = seed % 2;
    Launch launch(threads, resident < blocks ? resident : blocks, dynamic);
    put_in_order(launch.order, blocks / cluster, seed);
#if defined(SWITCH_BY_HAND)
    const unsigned mode = _mm_getcsr();
    _mm_setcsr(mode | 0x8040);  // subnormal numbers count as 0, as with -ftz=true
#endif
    launch.run(blocks / cluster);
#if defined(SWITCH_BY_HAND)
    _mm_setcsr(mode);
#endif
    return *failure ? failure : nullptr;
}

// ---- The words of CUDA ----------------------------------------------------------------------------------------------

#define __device__ inline
#define __global__ inline
#define __forceinline__
#define __launch_bounds__(...)
#define threadIdx (shim::now->index)
#define blockIdx (shim::now->block->index)
#define blockDim (shim::block_size)
#define gridDim (shim::grid)

inline void __syncthreads() { shim::wait(shim::now->block->barrier, shim::block_size.x); }
inline void __syncwarp(unsigned = 0xffffffffu) { shim::wait(shim::warp().barrier, shim::warp().lanes); }
inline void __threadfence() {}
inline void __nanosleep(unsigned) { shim::leave(); }
template <class T>
T __shfl_sync(unsigned, T value, int lane) {
    return shim::from_lane(value, lane);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
    return shim::from_lane(value, shim::now->index.x % 32 ^ mask);
}
inline bool __any_sync(unsigned, bool value) {
    shim::Warp& w = shim::warp();
    uint64_t* values = w.value[w.barrier.passed & 1];
    values[shim::now->index.x % 32] = value;
    shim::wait(w.barrier, w.lanes);
    for (unsigned lane = 0; lane < w.lanes; ++lane) value = value || values[lane];
    return value;
}
template <class T>
T atomicAdd(T* at, T value) {
    const T before = *at;
    *at += value;
    shim::progress = true;
    return before;
}
inline int __clz(int value) { return value ? __builtin_clz((unsigned)value) : 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
    return (unsigned long long)((unsigned __int128)a * b >> 64);
}

// ---- What values.cuh says in PTX -------------------------------------------------------------------------------

template <int BYTES> struct Words;
struct Pair;

#define SHARED(type, name, count)                                                                                      \
    static char name##_site;                                                                                           \
    type* name = (type*)shim::shared(&name##_site, sizeof(type) * (count))
#define DYNAMIC_SHARED(name) unsigned char* name = shim::now->block->dynamic.data()
#define ENTRY(kernel, type, width)                                                                                     \
    extern "C" void kernel##_##type##_##width(const void* p) { kernel<type, width>(*(const Parameters*)p); }
#define CLUSTER_KERNEL(kernel, type, width, blocks)                                                                    \
    extern "C" void kernel##_##type##_##width(const void* p) { kernel<type, width>(*(const Parameters*)p); }           \
    extern "C" const unsigned kernel##_##type##_##width##_blocks = blocks;

inline void shim_copy(void* to, const void* from, const void* global, size_t bytes) {
    if ((uintptr_t)global % bytes) shim::fail("a misaligned access");
    memcpy(to, from, bytes);
}
inline bool in_dynamic(const void* place, size_t bytes) {
    const std::vector<unsigned char>& dynamic = shim::now->block->dynamic;
    const uintptr_t at = (uintptr_t)place - (uintptr_t)dynamic.data();
    return at + bytes <= dynamic.size() && at % bytes == 0;
}
template <int BYTES, bool LAST> void copy_later(void* to, const void* from) {
    if ((uintptr_t)from % BYTES || !in_dynamic(to, BYTES)) shim::fail("a copy that is misaligned or out of place");
    if (BYTES == 2 || shim::at_once) memcpy(to, from, BYTES);
    else shim::now->copies.push_back({to, from, BYTES, shim::now->rounds});
}
inline void begin_barrier(unsigned long long* barrier, unsigned arrivals) {
    *(shim::Phase*)barrier = {0, (uint8_t)arrivals, (uint8_t)arrivals, shim::KNOWN, 0};
}
inline void fence_barriers() {}
inline void fence_async() {}
inline void expect_bytes(unsigned long long* barrier, unsigned bytes) { shim::arrive_at((uint64_t*)barrier, bytes); }
inline void arrive(unsigned long long* barrier) { shim::arrive_at((uint64_t*)barrier, 0); }
inline void wait_for_phase(unsigned long long* barrier, unsigned parity) {
    uint64_t* const place = (uint64_t*)barrier;
    while (shim::phase_of(place).parity == parity) {
        shim::finish_bulks(place);
        if (shim::phase_of(place).parity == parity) shim::leave();
    }
}
inline void copy_bulk(void* to, const void* from, int bytes, unsigned long long* barrier) {
    const std::vector<unsigned char>& room = shim::now->block->dynamic;
    const uintptr_t at = (uintptr_t)to - (uintptr_t)room.data();
    if ((uintptr_t)from % 16 || at % 16 || bytes % 16 || bytes <= 0 || at + bytes > room.size()) {
        shim::fail("a bulk copy that is misaligned or out of place");
    }
    shim::bulks.push_back({shim::now->block, to, from, (size_t)bytes, (uint64_t*)barrier});
    if (shim::at_once) shim::finish_bulks((uint64_t*)barrier);
}
inline unsigned cluster_rank() { return shim::now->block - shim::now->block->first; }
inline unsigned cluster_blocks() { return shim::cluster; }
inline void wait_for_cluster() {
    shim::Block& first = *shim::now->block->first;
    shim::wait(first.of_cluster, shim::cluster * shim::block_size.x);
}
template <class Pair> void store_in_block(unsigned rank, Pair* place, Pair value) {
    const size_t at = (unsigned char*)place - shim::now->block->shared.data();
    shim::Block& block = shim::now->block->first[rank];
    if (rank >= shim::cluster || at % sizeof(Pair) || at + sizeof(Pair) > shim::SHARED) {
        shim::fail("a store that is misaligned or out of the cluster");
    }
    if (!block.begun || !block.alive) shim::fail("a store into a block that has not begun or is gone");
    memcpy(block.shared.data() + at, &value, sizeof(Pair));
}
inline void wait_for_consumers() { shim::wait(shim::now->block->of_consumers, 256); }
inline void end_round() { ++shim::now->rounds; }
template <int ROUNDS> void wait_for_rounds() { shim::finish_copies(ROUNDS); }
inline void store_release(unsigned* to, unsigned value) {
    *to = value;
    shim::progress = true;
}
inline unsigned load_acquire(const unsigned* from) { return *from; }
template <int BYTES> void load(const void* from, Words<BYTES>& to) { shim_copy(&to, from, from, BYTES); }
template <int BYTES> void store_near(void* to, const Words<BYTES>& from) { shim_copy(to, &from, to, BYTES); }
template <int BYTES> void store(void* to, const Words<BYTES>& from) { shim_copy(to, &from, to, BYTES); }
template <class Pair> Pair load_shared(const Pair* from) {
    Pair to;
    shim_copy(&to, from, from, sizeof(Pair));
    return to;
}

// Conversions that keep subnormal float32, which the processor takes for 0 during a launch.
inline double float_to_double(float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    if (bits & 0x7f800000u) return value;
    const double size = (double)(bits & 0x7fffffu) * 0x1p-149;
    return bits >> 31 ? -size : size;
}
inline float double_to_float(double value) {
    if (!(fabs(value) < 0x1p-126)) return (float)value;
    uint32_t bits = (uint32_t)nearbyint(fabs(value) * 0x1p149) | (std::signbit(value) ? 0x80000000u : 0u);
    float narrow;
    memcpy(&narrow, &bits, 4);
    return narrow;
}

inline float half_to_float(unsigned short half) {
    _Float16 value;
    memcpy(&value, &half, 2);
    return (float)value;
}
inline unsigned short float_to_half(float value) {
    const _Float16 rounded = (_Float16)value;
    unsigned short half;
    memcpy(&half, &rounded, 2);
    return half;
}
inline unsigned short float_to_bfloat(float value) {
    if (value != value) return 0x7fff;
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (unsigned short)((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}
inline unsigned floats_to_halves(float first, float second) {
    return float_to_half(first) | (unsigned)float_to_half(second) << 16;
}
inline unsigned floats_to_bfloats(float first, float second) {
    return float_to_bfloat(first) | (unsigned)float_to_bfloat(second) << 16;
}
