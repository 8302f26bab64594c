// What all kernels are made of: the parameters of a launch, the four types of values, loads and stores, sums over a
// block, and how the last of several blocks is found.
//
// Plain CUDA C++ without an #include, so that a kernel compiles in a tenth of a second. _cuda_launch.py puts this file
// before the others. tests/cuda/shim.h gives the same words a meaning on a CPU: it defines ON_CPU, and what stands
// under #ifndef ON_CPU here.
//
// Multiplications and additions are fused where fma() is written and nowhere else (the option -fmad=false), so the
// bits are the same whoever compiles.

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

// Every field has 8 bytes, and FIELDS in _cuda_launch.py is the same list. A pointer that a kernel can do without is
// null where there is nothing.
struct Parameters {
    const void* x;   // (N, C, S)
    const void* u;   // (N, C, S): dy in a backward
    void* out;       // (N, C, S)
    double* mean;    // (C,), and so are the next
    double* m2;
    double* rstd;    // null: a plain sweep, without the formulas
    const double* shift;
    const double* weight;
    const double* bias;
    double* dweight;  // or the sum of u * (x - mean) in a plain sweep
    double* dbias;    // or the sum of u
    const double* a;  // the coefficients of a plain sweep
    const double* b;
    const double* c;
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
    int64 plane;     // items in a plane
    int64 stride;    // values from a plane to the next of the same channel, or from a row to the next
    int64 columns;   // threads side by side in a row (lines); a power of two
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
#define ENTRY(kernel, type, width)                                                                                     \
    extern "C" __global__ void __launch_bounds__(MOST_THREADS) kernel##_##type##_##width(                              \
        const __grid_constant__ Parameters p) {                                                                        \
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

// For the last time: its place in the cache is free.
DEVICE void load_last(const void* from, Words<16>& to) {
    asm volatile("ld.global.cs.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(to.word[0]), "=r"(to.word[1]), "=r"(to.word[2]), "=r"(to.word[3])
                 : "l"(from));
}
DEVICE void load_last(const void* from, Words<8>& to) {
    asm volatile("ld.global.cs.v2.u32 {%0, %1}, [%2];" : "=r"(to.word[0]), "=r"(to.word[1]) : "l"(from));
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

// What another block wrote: from the cache that all share, never from that of this multiprocessor.
DEVICE Pair load_shared(const Pair* from) {
    Pair to;
    asm volatile("ld.global.cg.v2.f64 {%0, %1}, [%2];" : "=d"(to.first), "=d"(to.second) : "l"(from) : "memory");
    return to;
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

#endif

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

// WIDTH values side by side, as they are loaded and stored at once. UNROLL such items are under way at a time.
template <class T, int WIDTH>
struct Item {
    typedef typename T::Stored Stored;
    enum { UNROLL = 4 };
    Words<WIDTH * (int)sizeof(Stored)> words;

    DEVICE void load(const Stored* from) { ::load(from, words); }
    DEVICE void load_last(const Stored* from) { ::load_last(from, words); }
    DEVICE void store(Stored* to) const { ::store(to, words); }
    DEVICE typename T::Value operator[](int i) const { return T::nth(words.word, i); }
    DEVICE void set(const typename T::Value* value) { T::template pack<WIDTH>(value, words.word); }
};

template <class T>
struct Item<T, 1> {
    typedef typename T::Stored Stored;
    enum { UNROLL = 8 };
    Stored stored;

    DEVICE void load(const Stored* from) { stored = *from; }
    DEVICE void load_last(const Stored* from) { stored = *from; }
    DEVICE void store(Stored* to) const { *to = stored; }
    DEVICE typename T::Value operator[](int) const { return T::value(stored); }
    DEVICE void set(const typename T::Value* value) { stored = T::rounded(*value); }
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
// The four sweeps, for data whose planes are long (channels-first) and for planes of one value (channels-last).
//
// A block has one part of one group of channels. Sums: the last block of a group to arrive pools the parts in their
// order, so the result does not depend on which block was last, and applies the formulas. Maps: the blocks take the
// parts backwards, to find in the cache what the sums read last.

// The part of a block.
struct Task {
    int64 group, part, first;  // the first item (or row)
    int count;                 // how many
};

DEVICE int items_in(const Parameters& p, int64 part) {
    const int64 left = p.items - part * p.part;
    return (int)(left < p.part ? left : p.part);
}

DEVICE Task task_of(const Parameters& p, int64 block) {
    Task task;
    task.part = divide(block, p.by_groups);
    task.group = block - task.part * p.groups;  // neighbours in memory are at work at the same time
    task.first = task.part * p.part;
    task.count = items_in(p, task.part);
    return task;
}

enum { AT_ONCE = 4 };  // loads of sums under way

// Pools the parts of a group once all are there. Each of the first `slots` threads has a channel and, in `sums`, what
// its block found for it; `width` is how many values of a channel are in an item.
template <class Sums>
DEVICE void finish(const Parameters& p, const Task& task, int slots, int width, int64 channel, Pair sums, Pair* room) {
    const int thread = threadIdx.x, slot = thread % slots;
    if (p.parts > 1) {
        SHARED(uint32, ticket, 1);
        Pair* partials = (Pair*)p.partials + task.group * p.parts * slots;
        if (thread < slots) partials[task.part * slots + slot] = sums;
        if (!last_to_arrive(p.tickets + task.group, p.parts, ticket)) return;
        // Threads with the same slot share its parts; all of them know the channel's origin.
        const int64 known = channel < p.channels ? channel : 0;
        const double origin = Sums::origin(p, known, load_shared(partials + slot));
        const int rows = blockDim.x / slots;
        double s = 0, q = 0;
        for (int64 first = thread / slots; first < p.parts; first += AT_ONCE * rows) {
            Pair found[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                const int64 part = first + k * rows;
                if (part < p.parts) found[k] = load_shared(partials + part * slots + slot);
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                const int64 part = first + k * rows;
                if (part < p.parts) Sums::pool((double)items_in(p, part) * width, origin, found[k], s, q);
            }
        }
        sum_over_block(s, q, slots, room);
        sums = Sums::pooled((double)p.n, origin, s, q);
    }
    if (thread < slots && channel < p.channels) Sums::finish(p, channel, sums);
}

// ---- Planes: a group is one channel, an item is WIDTH values of a plane ---------------------------------------------

// Goes over the items of a channel, from one of this thread to its next.
template <int WIDTH>
struct Walk {
    int64 offset, place;  // of the values in the data, and of the item in its plane
    int64 offset_step, place_step, plane, next_plane;

    DEVICE Walk(const Parameters& p, int64 channel, int64 item) : plane(p.plane) {
        next_plane = p.stride - plane * WIDTH;
        split(p, item, offset, place);
        offset += channel * plane * WIDTH;
        split(p, blockDim.x, offset_step, place_step);
    }
    DEVICE void split(const Parameters& p, int64 item, int64& offset, int64& place) const {
        const int64 planes = divide(item, p.by_plane);
        place = item - planes * plane;
        offset = planes * p.stride + place * WIDTH;
    }
    DEVICE void next() {
        offset += offset_step;
        place += place_step;
        if (place >= plane) {
            place -= plane;
            offset += next_plane;
        }
    }
};

template <class T, int WIDTH, class Sums>
DEVICE void sums_of_planes(const Parameters& p) {
    typedef Item<T, WIDTH> Item;
    enum { UNROLL = Item::UNROLL };
    SHARED(Pair, room, MOST_THREADS);
    const typename T::Stored *x = (const typename T::Stored*)p.x, *u = (const typename T::Stored*)p.u;
    const Task task = task_of(p, blockIdx.x);
    const int64 channel = task.group;
    const int thread = threadIdx.x, threads = blockDim.x;
    Walk<WIDTH> walk(p, channel, task.first + thread);
    const double shift = Sums::shift_of(p, channel, (double)T::value(x[Walk<WIDTH>(p, channel, task.first).offset]));
    Sums sums;
    int taken = 0;
    if (thread < task.count) sums.start(p, channel, (double)T::value(x[walk.offset]));
    for (int i = thread; i < task.count; i += UNROLL * threads) {
        Item of_x[UNROLL], of_u[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * threads < task.count) {
                of_x[k].load(x + walk.offset);
                if (Sums::INPUTS == 2) of_u[k].load(u + walk.offset);
                walk.next();
            }
        }
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * threads < task.count) {
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) sums.add(of_x[k][j], Sums::INPUTS == 2 ? of_u[k][j] : 0);
                taken += WIDTH;
            }
        }
        sums.add_few();
    }
    sums.about(shift, taken);
    sum_over_block(sums.s, sums.q, 1, room);
    const Pair part = Sums::part((double)task.count * WIDTH, shift, sums.s, sums.q);
    finish<Sums>(p, task, 1, WIDTH, channel, part, room);
}

template <class T, int WIDTH, class Map>
DEVICE void map_of_planes(const Parameters& p) {
    typedef Item<T, WIDTH> Item;
    enum { UNROLL = Item::UNROLL };
    const typename T::Stored *x = (const typename T::Stored*)p.x, *u = (const typename T::Stored*)p.u;
    typename T::Stored* out = (typename T::Stored*)p.out;
    const Task task = task_of(p, (int64)gridDim.x - 1 - blockIdx.x);
    const int64 channel = task.group;
    const int thread = threadIdx.x, threads = blockDim.x;
    Walk<WIDTH> walk(p, channel, task.first + thread);
    const Map map(p, channel);
    for (int i = thread; i < task.count; i += UNROLL * threads) {
        Item of_x[UNROLL], of_u[UNROLL];
        int64 offset[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * threads < task.count) {
                offset[k] = walk.offset;
                of_x[k].load_last(x + walk.offset);
                if (Map::INPUTS == 2) of_u[k].load_last(u + walk.offset);
                walk.next();
            }
        }
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * threads < task.count) {
                typename T::Value result[WIDTH];
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) result[j] = map.of(of_x[k][j], Map::INPUTS == 2 ? of_u[k][j] : 0);
                of_x[k].set(result);
                of_x[k].store(out + offset[k]);
            }
        }
    }
}

// ---- Lines: a row is one value of each channel, an item is one of each of WIDTH channels ----------------------------
// A group is the channels of `columns` threads side by side. A thread stays with its channels and goes down the rows.

// The place of a thread.
template <int WIDTH>
struct Column {
    int threads, row, rows;  // side by side; the first row, and from a row to the thread's next
    int64 channel;           // the first of WIDTH
    int64 offset, step;      // of that channel in the thread's first row; to its next row
    bool inside;

    DEVICE Column(const Parameters& p, const Task& task) : threads((int)p.columns) {
        const int thread = threadIdx.x;
        row = thread / threads;
        rows = blockDim.x / threads;
        channel = (task.group * threads + thread % threads) * WIDTH;
        inside = channel < p.channels;
        offset = (task.first + row) * p.stride + channel;
        step = rows * p.stride;
    }
};

template <class T, int WIDTH, class Sums>
DEVICE void sums_of_lines(const Parameters& p) {
    typedef Item<T, WIDTH> Item;
    enum { UNROLL = Item::UNROLL };
    SHARED(Pair, room, MOST_THREADS);
    const typename T::Stored *x = (const typename T::Stored*)p.x, *u = (const typename T::Stored*)p.u;
    const Task task = task_of(p, blockIdx.x);
    const Column<WIDTH> column(p, task);
    Sums sums[WIDTH];
    double shift[WIDTH] = {};
    int taken = 0;
    if (column.inside) {
        Item first, own;
        first.load(x + task.first * p.stride + column.channel);
        own = first;
        if (column.row < task.count) own.load(x + column.offset);
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            shift[j] = Sums::shift_of(p, column.channel + j, (double)first[j]);
            sums[j].start(p, column.channel + j, (double)own[j]);
        }
        int64 offset = column.offset;
        for (int i = column.row; i < task.count; i += UNROLL * column.rows) {
            Item of_x[UNROLL], of_u[UNROLL];
#pragma unroll
            for (int k = 0; k < UNROLL; ++k) {
                if (i + k * column.rows < task.count) {
                    of_x[k].load(x + offset);
                    if (Sums::INPUTS == 2) of_u[k].load(u + offset);
                    offset += column.step;
                }
            }
#pragma unroll
            for (int k = 0; k < UNROLL; ++k) {
                if (i + k * column.rows < task.count) {
#pragma unroll
                    for (int j = 0; j < WIDTH; ++j) sums[j].add(of_x[k][j], Sums::INPUTS == 2 ? of_u[k][j] : 0);
                    ++taken;
                }
            }
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sums[j].add_few();
        }
    }
    // The threads of row j end the j-th channel of their column.
    double s = 0, q = 0, mine = 0;
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) {
        sums[j].about(shift[j], taken);
        sum_over_block(sums[j].s, sums[j].q, column.threads, room);
        if (column.row == j) {
            s = sums[j].s;
            q = sums[j].q;
            mine = shift[j];
        }
    }
    const Pair part = Sums::part((double)task.count, mine, s, q);
    finish<Sums>(p, task, column.threads * WIDTH, 1, column.channel + column.row % WIDTH, part, room);
}

template <class T, int WIDTH, class Map>
DEVICE void map_of_lines(const Parameters& p) {
    typedef Item<T, WIDTH> Item;
    enum { UNROLL = Item::UNROLL };
    const typename T::Stored *x = (const typename T::Stored*)p.x, *u = (const typename T::Stored*)p.u;
    typename T::Stored* out = (typename T::Stored*)p.out;
    const Task task = task_of(p, (int64)gridDim.x - 1 - blockIdx.x);
    const Column<WIDTH> column(p, task);
    if (!column.inside) return;
    Map map[WIDTH];
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) map[j] = Map(p, column.channel + j);
    int64 offset = column.offset;
    for (int i = column.row; i < task.count; i += UNROLL * column.rows) {
        Item of_x[UNROLL], of_u[UNROLL];
        const int64 start = offset;
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * column.rows < task.count) {
                of_x[k].load_last(x + offset);
                if (Map::INPUTS == 2) of_u[k].load_last(u + offset);
                offset += column.step;
            }
        }
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * column.rows < task.count) {
                typename T::Value result[WIDTH];
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    result[j] = map[j].of(of_x[k][j], Map::INPUTS == 2 ? of_u[k][j] : 0);
                }
                of_x[k].set(result);
                of_x[k].store(out + start + k * column.step);
            }
        }
    }
}

// ---- The kernels ----------------------------------------------------------------------------------------------------

#define KERNEL(name, body, what)                                                                                       \
    template <class T, int WIDTH> DEVICE void name(const Parameters& p) { body<T, WIDTH, what<T>>(p); }

KERNEL(moments_planes, sums_of_planes, MomentSums)
KERNEL(moments_lines, sums_of_lines, MomentSums)
KERNEL(dots_planes, sums_of_planes, DotSums)
KERNEL(dots_lines, sums_of_lines, DotSums)
KERNEL(affine_planes, map_of_planes, Affine)
KERNEL(affine_lines, map_of_lines, Affine)
KERNEL(affine2_planes, map_of_planes, Affine2)
KERNEL(affine2_lines, map_of_lines, Affine2)

// (E4) x and u are the running mean and var, (C,); out is (2, C), both after one more batch, whose var is given as m2.
template <class T, int WIDTH>
DEVICE void running(const Parameters& p) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.channels) return;
    const typename T::Stored *mean = (const typename T::Stored*)p.x, *var = (const typename T::Stored*)p.u;
    typename T::Stored* out = (typename T::Stored*)p.out;
    out[i] = (typename T::Stored)update_running((double)mean[i], p.mean[i], p.momentum);
    out[p.channels + i] = (typename T::Stored)update_running((double)var[i], p.m2[i], p.momentum);
}
ENTRY(moments_planes, float32, 4)
ENTRY(moments_planes, float32, 1)
ENTRY(moments_planes, float16, 8)
ENTRY(moments_planes, float16, 4)
ENTRY(moments_planes, float16, 1)
ENTRY(moments_planes, bfloat16, 8)
ENTRY(moments_planes, bfloat16, 4)
ENTRY(moments_planes, bfloat16, 1)
ENTRY(moments_planes, float64, 2)
ENTRY(moments_planes, float64, 1)
ENTRY(moments_lines, float32, 4)
ENTRY(moments_lines, float32, 1)
ENTRY(moments_lines, float16, 8)
ENTRY(moments_lines, float16, 4)
ENTRY(moments_lines, float16, 1)
ENTRY(moments_lines, bfloat16, 8)
ENTRY(moments_lines, bfloat16, 4)
ENTRY(moments_lines, bfloat16, 1)
ENTRY(moments_lines, float64, 2)
ENTRY(moments_lines, float64, 1)
ENTRY(dots_planes, float32, 4)
ENTRY(dots_planes, float32, 1)
ENTRY(dots_planes, float16, 8)
ENTRY(dots_planes, float16, 4)
ENTRY(dots_planes, float16, 1)
ENTRY(dots_planes, bfloat16, 8)
ENTRY(dots_planes, bfloat16, 4)
ENTRY(dots_planes, bfloat16, 1)
ENTRY(dots_planes, float64, 2)
ENTRY(dots_planes, float64, 1)
ENTRY(dots_lines, float32, 4)
ENTRY(dots_lines, float32, 1)
ENTRY(dots_lines, float16, 8)
ENTRY(dots_lines, float16, 4)
ENTRY(dots_lines, float16, 1)
ENTRY(dots_lines, bfloat16, 8)
ENTRY(dots_lines, bfloat16, 4)
ENTRY(dots_lines, bfloat16, 1)
ENTRY(dots_lines, float64, 2)
ENTRY(dots_lines, float64, 1)
ENTRY(affine_planes, float32, 4)
ENTRY(affine_planes, float32, 1)
ENTRY(affine_planes, float16, 8)
ENTRY(affine_planes, float16, 4)
ENTRY(affine_planes, float16, 1)
ENTRY(affine_planes, bfloat16, 8)
ENTRY(affine_planes, bfloat16, 4)
ENTRY(affine_planes, bfloat16, 1)
ENTRY(affine_planes, float64, 2)
ENTRY(affine_planes, float64, 1)
ENTRY(affine_lines, float32, 4)
ENTRY(affine_lines, float32, 1)
ENTRY(affine_lines, float16, 8)
ENTRY(affine_lines, float16, 4)
ENTRY(affine_lines, float16, 1)
ENTRY(affine_lines, bfloat16, 8)
ENTRY(affine_lines, bfloat16, 4)
ENTRY(affine_lines, bfloat16, 1)
ENTRY(affine_lines, float64, 2)
ENTRY(affine_lines, float64, 1)
ENTRY(affine2_planes, float32, 4)
ENTRY(affine2_planes, float32, 1)
ENTRY(affine2_planes, float16, 8)
ENTRY(affine2_planes, float16, 4)
ENTRY(affine2_planes, float16, 1)
ENTRY(affine2_planes, bfloat16, 8)
ENTRY(affine2_planes, bfloat16, 4)
ENTRY(affine2_planes, bfloat16, 1)
ENTRY(affine2_planes, float64, 2)
ENTRY(affine2_planes, float64, 1)
ENTRY(affine2_lines, float32, 4)
ENTRY(affine2_lines, float32, 1)
ENTRY(affine2_lines, float16, 8)
ENTRY(affine2_lines, float16, 4)
ENTRY(affine2_lines, float16, 1)
ENTRY(affine2_lines, bfloat16, 8)
ENTRY(affine2_lines, bfloat16, 4)
ENTRY(affine2_lines, bfloat16, 1)
ENTRY(affine2_lines, float64, 2)
ENTRY(affine2_lines, float64, 1)
ENTRY(running, float32, 1)
ENTRY(running, float64, 1)
