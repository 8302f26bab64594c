// The five sweeps, for data whose planes are long (channels-first); rows.cu has those for planes of one value.
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

DEVICE Task task_of(const Parameters& p, int64 group, int64 part) {
    Task task;
    task.group = group;
    task.part = part;
    task.first = part * p.part;
    task.count = items_in(p, part);
    return task;
}

DEVICE Task task_of(const Parameters& p, int64 block) {
    const int64 part = divide(block, p.by_groups);
    return task_of(p, block - part * p.groups, part);  // neighbours in memory are at work at the same time
}
DEVICE Task sums_task(const Parameters& p) { return task_of(p, blockIdx.x); }
DEVICE Task map_task(const Parameters& p) { return task_of(p, (int64)gridDim.x - 1 - blockIdx.x); }

// ---- How many values count, where a mask decides --------------------------------------------------------------------
// Behind the sums of all parts stands for each group and part a Pair, whose first is the number of its values.

DEVICE Pair* counts_of(const Parameters& p, int64 group, int64 slots) {
    return (Pair*)p.partials + p.groups * p.parts * slots + group * p.parts;
}

struct Counted {
    double n;      // of all parts
    uint32 first;  // the first part that has any, or 0
};

DEVICE Counted count_parts(const Parameters& p, const Pair* counts, Pair* room) {
    Counted all = {0, (uint32)p.parts};
    double none = 0;
    for (int64 part = threadIdx.x; part < p.parts; part += blockDim.x) {
        const double n = load_shared(counts + part).first;
        all.n += n;
        if (n > 0 && part < all.first) all.first = (uint32)part;
    }
    sum_over_block(all.n, none, 1, room);
    all.first = least_of_block(all.first, (uint32*)room);
    if (all.n == 0) all.first = 0;
    return all;
}

// (E1) Of n values; the moments of nothing are 0 and 0.
DEVICE Pair unless_empty(double n, Pair moments) {
    if (n == 0) moments.first = moments.second = 0;
    return moments;
}

// ---- Pooling --------------------------------------------------------------------------------------------------------

// Pools the parts of a group once all are there. Each of the first `slots` threads has a channel and, in `sums`, what
// its block found for it; `width` is how many values of a channel are in an item, AT_ONCE how many loads are
// under way. COUNTS: the block found `n` values that count. Whether this block was the last.
template <class Sums, int AT_ONCE = 4, bool COUNTS = false>
DEVICE bool finish(
    const Parameters& p, const Task& task, int slots, int width, int64 channel, Pair sums, Pair* room, double n = 0) {
    const int thread = threadIdx.x, slot = thread % slots;
    if (p.parts > 1) {
        SHARED(uint32, ticket, 1);
        Pair* partials = (Pair*)p.partials + task.group * p.parts * slots;
        Pair* counts = counts_of(p, task.group, slots);
        if (thread < slots) partials[task.part * slots + slot] = sums;
        if (COUNTS && thread == 0) counts[task.part].first = n;
        if (!last_to_arrive(p.tickets + task.group, p.parts, ticket)) return false;
        // Threads with the same slot share its parts; all of them know the channel's origin.
        const int64 known = channel < p.channels ? channel : 0;
        Counted all = {(double)p.n, 0};
        if (COUNTS) all = count_parts(p, counts, room);
        const double origin = Sums::origin(p, known, load_shared(partials + all.first * slots + slot));
        const int rows = blockDim.x / slots;
        double s = 0, q = 0;
        for (int64 first = thread / slots; first < p.parts; first += AT_ONCE * rows) {
            Pair found[AT_ONCE];
            double values[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                const int64 part = first + k * rows;
                if (part < p.parts) found[k] = load_shared(partials + part * slots + slot);
                if (COUNTS && part < p.parts) values[k] = load_shared(counts + part).first;
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                const int64 part = first + k * rows;
                const double of_part = COUNTS ? values[k] : (double)items_in(p, part) * width;
                if (part < p.parts) Sums::pool(of_part, origin, found[k], s, q);
            }
        }
        sum_over_block(s, q, slots, room);
        sums = Sums::pooled(all.n, origin, s, q);
        if (COUNTS) sums = unless_empty(all.n, sums);
    }
    if (thread < slots && channel < p.channels) Sums::finish(p, channel, sums);
    return true;
}

// ---- Planes: a group is one channel, an item is WIDTH values of a plane ---------------------------------------------

// Goes over the items of a channel, from one of this thread to its next.
template <int WIDTH>
struct Walk {
    int64 offset, place;  // of the values in the data, and of the item in its plane
    int64 offset_step, place_step, plane, next_plane;

    DEVICE Walk(const Parameters& p, int64 channel, int64 item) : Walk(p, channel, item, blockDim.x) {}
    DEVICE Walk(const Parameters& p, int64 channel, int64 item, int step) : plane(p.plane) {
        next_plane = p.stride - plane * WIDTH;
        split(p, item, offset, place);
        offset += channel * plane * WIDTH;
        split(p, step, offset_step, place_step);
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

// The shift of the first thread that has one; 0 where none has.
DEVICE double first_shift(double shift, int taken, Pair* room) {
    const uint32 thread = least_of_block(taken ? threadIdx.x : MOST_THREADS, (uint32*)room);
    if (threadIdx.x == thread) room->first = shift;
    __syncthreads();
    shift = thread < MOST_THREADS ? room->first : 0;
    __syncthreads();  // before the room is used again
    return shift;
}

template <class T, int WIDTH, class Sums, int CHOICE>
DEVICE bool sums_of_planes(const Parameters& p, const Task& task) {
    typedef Item<T, WIDTH> Item;
    enum { UNROLL = Item::UNROLL, COUNTS = CHOICE == MASKED && Sums::INPUTS == 1 };
    SHARED(Pair, room, MOST_THREADS);
    const typename T::Stored *x = (const typename T::Stored*)p.x, *u = (const typename T::Stored*)p.u;
    const int64 channel = task.group;
    const int thread = threadIdx.x, threads = blockDim.x;
    Walk<WIDTH> walk(p, channel, task.first + thread);
    double shift = 0;
    if (!COUNTS) shift = Sums::shift_of(p, channel, (double)T::value(x[Walk<WIDTH>(p, channel, task.first).offset]));
    Sums sums;
    int taken = 0;
    if (!COUNTS && thread < task.count) sums.start(p, channel, (double)T::value(x[walk.offset]));
    for (int i = thread; i < task.count; i += UNROLL * threads) {
        Item of_x[UNROLL], of_u[UNROLL];
        Marks<WIDTH> marks[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * threads < task.count) {
                of_x[k].load(x + walk.offset);
                if (Sums::INPUTS == 2) of_u[k].load(u + walk.offset);
                if (CHOICE == MASKED) marks[k].load(p.where, task.first + i + k * threads);
                walk.next();
            }
        }
        if (COUNTS && taken == 0) {
            bool found = false;
            double first = 0;
#pragma unroll
            for (int k = 0; k < UNROLL; ++k) {
                if (i + k * threads < task.count) {
#pragma unroll
                    for (int j = 0; j < WIDTH; ++j) {
                        if (!found && marks[k][j]) first = (double)of_x[k][j];
                        found = found || marks[k][j];
                    }
                }
            }
            if (found) sums.start(p, channel, first);
        }
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * threads < task.count) {
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    const typename T::Value of_w = Sums::INPUTS == 2 ? of_u[k][j] : 0;
                    const bool counts = CHOICE == MASKED ? marks[k][j] : CHOICE == ALL || of_w != 0;
                    sums.add(of_x[k][j], of_w, counts);
                    if (COUNTS) taken += counts;
                }
                if (!COUNTS) taken += WIDTH;
                if (sizeof(typename Sums::Summed) == 4 && WIDTH > 1) sums.add_few();  // before float32 is too narrow
            }
        }
        sums.add_few();
    }
    double n = COUNTS ? (double)taken : (double)task.count * WIDTH, none = 0;
    if constexpr (COUNTS) {
        shift = first_shift((double)sums.shift, taken, room);
        sum_over_block(n, none, 1, room);
    }
    sums.about(shift, taken);
    sum_over_block(sums.s, sums.q, 1, room);
    Pair part = Sums::part(n, shift, sums.s, sums.q);
    if (COUNTS) part = unless_empty(n, part);
    return finish<Sums, 4, COUNTS>(p, task, 1, WIDTH, channel, part, room, n);
}

// A map of as many inputs as it has; three take the registers of twice as many loads.
template <class Map, class Value>
DEVICE Value mapped(const Map& map, Value x, Value u, Value v, bool counts = true) {
    if constexpr (Map::INPUTS == 3) {
        return map.of(x, u, v, counts);
    } else {
        return map.of(x, u, counts);
    }
}

template <class T, int WIDTH, class Map, int CHOICE>
DEVICE void map_of_planes(const Parameters& p, const Task& task) {
    typedef Item<T, WIDTH> Item;
    enum { UNROLL = Map::INPUTS == 3 ? Item::UNROLL / 2 : Item::UNROLL };
    const typename T::Stored *x = (const typename T::Stored*)p.x, *u = (const typename T::Stored*)p.u;
    const typename T::Stored* v = (const typename T::Stored*)p.v;
    typename T::Stored* out = (typename T::Stored*)p.out;
    const int64 channel = task.group;
    const int thread = threadIdx.x, threads = blockDim.x;
    Walk<WIDTH> walk(p, channel, task.first + thread);
    const Map map(p, channel);
    for (int i = thread; i < task.count; i += UNROLL * threads) {
        Item of_x[UNROLL], of_u[UNROLL], of_v[UNROLL];
        Marks<WIDTH> marks[UNROLL];
        int64 offset[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * threads < task.count) {
                offset[k] = walk.offset;
                of_x[k].load(x + walk.offset);
                if (Map::INPUTS >= 2) of_u[k].load(u + walk.offset);
                if (Map::INPUTS == 3) of_v[k].load(v + walk.offset);
                if (CHOICE == MASKED) marks[k].load(p.where, task.first + i + k * threads);
                walk.next();
            }
        }
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (i + k * threads < task.count) {
                typename T::Value result[WIDTH];
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    const typename T::Value of_w = Map::INPUTS >= 2 ? of_u[k][j] : 0;
                    const bool counts = CHOICE == ALL || marks[k][j];
                    result[j] = mapped(map, of_x[k][j], of_w, Map::INPUTS == 3 ? of_v[k][j] : 0, counts);
                }
                of_x[k].set(result);
                of_x[k].store_near(out + offset[k]);
            }
        }
    }
}

// ---- The kernels ----------------------------------------------------------------------------------------------------

#define KERNEL(name, body, what, task, choice)                                                                         \
    template <class T, int WIDTH> DEVICE void name(const Parameters& p) { body<T, WIDTH, what<T>, choice>(p, task(p)); }

KERNEL(moments_planes, sums_of_planes, MomentSums, sums_task, ALL)
KERNEL(dots_planes, sums_of_planes, DotSums, sums_task, ALL)
KERNEL(affine_planes, map_of_planes, Affine, map_task, ALL)
KERNEL(affine2_planes, map_of_planes, Affine2, map_task, ALL)
KERNEL(affine3_planes, map_of_planes, Affine3, map_task, ALL)
KERNEL(moments_masked_planes, sums_of_planes, MomentSums, sums_task, MASKED)
KERNEL(dots_masked_planes, sums_of_planes, DotSums, sums_task, MASKED)
KERNEL(dots_nonzero_planes, sums_of_planes, DotSums, sums_task, NONZERO)
KERNEL(affine2_masked_planes, map_of_planes, Affine2, map_task, MASKED)
KERNEL(affine3_masked_planes, map_of_planes, Affine3, map_task, MASKED)

template <class T, int WIDTH> DEVICE void affine_fixed_planes(const Parameters& p) {
    AffineFixed<T>::keep(p);
    map_of_planes<T, WIDTH, AffineFixed<T>, ALL>(p, map_task(p));
}

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

// x, u, weight and bias are vectors (C,) of the type, or null; out has a row (C,) of doubles for each.
template <class T, int WIDTH>
DEVICE void vectors(const Parameters& p) {
    const int64 i = (int64)blockIdx.x * blockDim.x + threadIdx.x;
    if (i >= p.channels) return;
    const void* given[4] = {p.x, p.u, p.weight, p.bias};
    double* out = (double*)p.out + i;
#pragma unroll
    for (int k = 0; k < 4; ++k) {
        if (given[k]) out[k * p.channels] = (double)T::value(((const typename T::Stored*)given[k])[i]);
    }
}
