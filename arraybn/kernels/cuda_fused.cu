// A forward or a backward in one launch that reads each value from memory once. It stands behind cuda_sweeps.cu.
//
// Resident: a block takes one channel (planes) or some channels side by side (lines), copies their values into shared
// memory, sums them up while they arrive, applies the formulas, and maps what it has kept.
//
// Pipeline, for channels that are too large for that: blocks draw tickets for tasks, which are those of the sweeps. The
// map of a part comes some tasks behind its sums, so that it finds its values in the cache.

// ---- Resident: the places of a thread's items, in the data and in shared memory -------------------------------------
// A thread reads from shared memory only what it has copied there itself, so no barrier stands between. Kept in
// registers, the values of a small channel would be spared this way; but then their number would be fixed for each
// kernel, and the loads under way would be bound to registers too.

template <int WIDTH>
struct InPlanes {
    enum { CHANNELS = 1 };  // that the values of an item belong to
    Walk<WIDTH> walk;
    int64 channel;
    int columns, row, slot, slots;
    bool inside;

    DEVICE explicit InPlanes(const Parameters& p) : walk(p, blockIdx.x, threadIdx.x) {
        channel = blockIdx.x;
        columns = 1;
        row = slot = threadIdx.x;
        slots = (int)p.items;
        inside = true;
    }
    DEVICE int64 offset() const { return walk.offset; }
    DEVICE int64 first() const { return channel * walk.plane * WIDTH; }  // the first value of the channel
    DEVICE bool more() const { return slot < slots; }
    DEVICE void next() {
        walk.next();
        slot += blockDim.x;
    }
};

template <int WIDTH>
struct InLines {
    enum { CHANNELS = WIDTH };
    Column<WIDTH> column;
    int64 channel;
    int columns, row, slot, slots;
    bool inside;

    DEVICE explicit InLines(const Parameters& p) : column(p, task_of(p, blockIdx.x, 0)) {
        channel = column.channel;
        columns = column.threads;
        row = column.row;
        slot = threadIdx.x;
        slots = (int)p.items * columns;
        inside = column.inside;
    }
    DEVICE int64 offset() const { return column.offset; }
    DEVICE int64 first() const { return channel; }
    DEVICE bool more() const { return inside && slot < slots; }
    DEVICE void next() {
        column.offset += column.step;
        slot += blockDim.x;
    }
};

// ---- Resident: what a block does ------------------------------------------------------------------------------------

enum { ROUNDS = 3 };  // of UNROLL copies under way, while the values of an earlier round are summed up

// A round of copies: of x, and of u behind all of x.
template <int INPUTS, class Item, class Place>
DEVICE void copy_round(const Parameters& p, Place& place, Item* kept) {
    typedef typename Item::Stored Stored;
#pragma unroll
    for (int k = 0; k < Item::UNROLL; ++k) {
        if (place.more()) {
            copy_later<sizeof(Item)>(kept + place.slot, (const Stored*)p.x + place.offset());
            if (INPUTS == 2) {
                copy_later<sizeof(Item)>(kept + place.slots + place.slot, (const Stored*)p.u + place.offset());
            }
            place.next();
        }
    }
    end_round();
}

// A round of sums, of values that have arrived.
template <class Sums, int WIDTH, class Item, class Place>
DEVICE void add_round(const Place& place, const Item* kept, int& slot, Sums* sums) {
    enum { CHANNELS = Place::CHANNELS };
#pragma unroll
    for (int k = 0; k < Item::UNROLL; ++k) {
        if (slot < place.slots) {
            const Item x = kept[slot], u = kept[Sums::INPUTS == 2 ? place.slots + slot : slot];
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sums[CHANNELS == 1 ? 0 : j].add(x[j], u[j]);
            slot += blockDim.x;
        }
    }
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) sums[j].add_few();
}

// The sums of the whole block, and of each channel's n values mean and m2 (or what else Sums makes of them).
template <class Sums, int WIDTH, class Place>
DEVICE void end_sums(
    const Parameters& p, const Place& place, const double* shift, Sums* sums, Pair* found, Pair* room) {
    enum { CHANNELS = Place::CHANNELS };
    const int threads = blockDim.x;
    const int taken = place.more() ? (place.slots - place.slot + threads - 1) / threads : 0;
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
        sums[j].about(shift[j], taken * (WIDTH / CHANNELS));
        sum_over_block(sums[j].s, sums[j].q, place.columns, room);
        found[j] = Sums::part((double)p.n, shift[j], sums[j].s, sums[j].q);
    }
}

template <class T, int WIDTH, class Sums, class Map, class Place>
DEVICE void resident(const Parameters& p) {
    typedef Item<T, WIDTH> Item;
    typedef typename T::Stored Stored;
    enum { CHANNELS = Place::CHANNELS, UNROLL = Item::UNROLL };
    DYNAMIC_SHARED(memory);
    Item* kept = (Item*)memory;
    SHARED(Pair, room, MOST_THREADS);
    const Place start(p);
    Sums sums[CHANNELS];
    double shift[CHANNELS] = {};
    Pair found[CHANNELS];

    Place ahead = start;
    for (int round = 0; round < ROUNDS; ++round) copy_round<Sums::INPUTS>(p, ahead, kept);
    if (start.inside) {
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j) {
            const double first = (double)T::value(((const Stored*)p.x)[start.first() + j]);
            shift[j] = Sums::shift_of(p, start.channel + j, first);
        }
    }
    if (start.more()) {
        int slot = start.slot;
        do {
            copy_round<Sums::INPUTS>(p, ahead, kept);
            wait_for_rounds<ROUNDS>();
            if (slot == start.slot) {
                const Item own = kept[slot];
#pragma unroll
                for (int j = 0; j < CHANNELS; ++j) sums[j].start(p, start.channel + j, (double)own[j]);
            }
            add_round<Sums, WIDTH>(start, kept, slot, sums);
        } while (slot < start.slots);
    }
    end_sums<Sums, WIDTH>(p, start, shift, sums, found, room);

    // (E1) of float64: sums about a mean that is nearly right, as others lose digits.
    if constexpr (Sums::INPUTS == 1 && sizeof(Stored) == 8) {
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j) {
            shift[j] = Sums::shift_of(p, start.channel + j, found[j].first);
            sums[j] = Sums();
            sums[j].start(p, start.channel + j, shift[j]);
        }
        if (start.more()) {
            for (int slot = start.slot; slot < start.slots;) add_round<Sums, WIDTH>(start, kept, slot, sums);
        }
        end_sums<Sums, WIDTH>(p, start, shift, sums, found, room);
    }

    // The threads of row j end the j-th channel of their column.
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) {
        if (start.inside && start.row == j) Sums::finish(p, start.channel + j, found[j]);
    }
    __syncthreads();
    if (!start.more()) return;
    Map map[CHANNELS];
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) map[j] = Map(p, start.channel + j);
    for (Place place = start; place.more();) {
        Item of_x[UNROLL], of_u[UNROLL];
        const int slot = place.slot;
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            const int at = slot + k * (int)blockDim.x;
            if (at < place.slots) {
                of_x[k] = kept[at];
                if (Map::INPUTS == 2) of_u[k] = kept[place.slots + at];
            }
        }
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            if (place.more()) {
                typename T::Value result[WIDTH];
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    result[j] = map[CHANNELS == 1 ? 0 : j].of(of_x[k][j], Map::INPUTS == 2 ? of_u[k][j] : of_x[k][j]);
                }
                of_x[k].set(result);
                of_x[k].store((Stored*)p.out + place.offset());
                place.next();
            }
        }
    }
}

// ---- The pipeline ---------------------------------------------------------------------------------------------------
// Tickets go first to the sums of p.ahead tasks, then in turn to the sums of the next task and the map of the earliest,
// at last to the maps that are left. p.ahead is at least the parts of a group, so the map of a part comes behind all
// sums of its group: it waits only for lower tickets. Those were drawn by blocks that are running, so the lowest ticket
// at work never waits, however few blocks run at a time.
//
// p.tickets counts: the parts of each group that are summed; for each group, whether its formulas are applied; the
// tickets drawn; the blocks that have found no more. All are zero before and after a launch.

struct Step {
    bool sums;  // or the map
    uint32 group, part;
};

DEVICE Step step_of(const Parameters& p, uint32 ticket) {
    const uint32 ahead = (uint32)p.ahead, parts = (uint32)p.parts, tasks = (uint32)p.groups * parts;
    uint32 task = ticket;
    Step step;
    step.sums = true;
    if (ticket >= 2 * tasks - ahead) {
        step.sums = false;
        task -= tasks;
    } else if (ticket >= ahead) {
        step.sums = (ticket - ahead) % 2 == 0;
        task = (ticket - ahead) / 2 + (step.sums ? ahead : 0);
    }
    step.group = task / parts;
    step.part = task - step.group * parts;
    return step;
}

// The flag of a group, which says that its formulas are applied.
DEVICE uint32* ready(const Parameters& p, const Step& step) { return p.tickets + p.groups + step.group; }

// Draws a ticket for the block; false where there are no more.
DEVICE bool draw(const Parameters& p, uint32* ticket) {
    __syncthreads();  // all have read the last one
    if (threadIdx.x == 0) *ticket = atomicAdd(p.tickets + 2 * p.groups, 1u);
    __syncthreads();
    return *ticket < 2 * (uint32)(p.groups * p.parts);
}

// What the threads of this block wrote is seen by whoever waits for the flag.
DEVICE void publish(uint32* flag) {
    __syncthreads();
    if (threadIdx.x == 0) store_release(flag, 1u);
}
DEVICE void wait_for(const uint32* flag) {
    if (threadIdx.x == 0) {
        while (!load_acquire(flag)) __nanosleep(64);
    }
    __syncthreads();
}

template <class T, int WIDTH, class Sums, class Map, bool LINES>
DEVICE void pipeline(const Parameters& p) {
    SHARED(uint32, ticket, 1);
    while (draw(p, ticket)) {
        const Step step = step_of(p, *ticket);
        const Task task = task_of(p, step.group, step.part);
        if (step.sums) {
            bool last;
            if constexpr (LINES) last = sums_of_lines<T, WIDTH, Sums>(p, task);
            else last = sums_of_planes<T, WIDTH, Sums>(p, task);
            if (last) publish(ready(p, step_of(p, *ticket)));  // read again: a register less meanwhile
        } else {
            wait_for(ready(p, step));
            if constexpr (LINES) map_of_lines<T, WIDTH, Map>(p, task);
            else map_of_planes<T, WIDTH, Map>(p, task);
        }
    }
    if (last_to_arrive(p.tickets + 2 * p.groups + 1, gridDim.x, ticket)) {
        for (int64 i = threadIdx.x; i <= p.groups; i += blockDim.x) p.tickets[p.groups + i] = 0;  // flags, and tickets
    }
}

// ---- The kernels ----------------------------------------------------------------------------------------------------

#define FUSED(name, sums, map)                                                                                         \
    template <class T, int WIDTH> DEVICE void name##_resident_planes(const Parameters& p) {                            \
        resident<T, WIDTH, sums<T>, map<T>, InPlanes<WIDTH>>(p);                                                       \
    }                                                                                                                  \
    template <class T, int WIDTH> DEVICE void name##_resident_lines(const Parameters& p) {                             \
        resident<T, WIDTH, sums<T>, map<T>, InLines<WIDTH>>(p);                                                        \
    }                                                                                                                  \
    template <class T, int WIDTH> DEVICE void name##_pipeline_planes(const Parameters& p) {                            \
        pipeline<T, WIDTH, sums<T>, map<T>, false>(p);                                                                 \
    }                                                                                                                  \
    template <class T, int WIDTH> DEVICE void name##_pipeline_lines(const Parameters& p) {                             \
        pipeline<T, WIDTH, sums<T>, map<T>, true>(p);                                                                  \
    }

FUSED(forward, MomentSums, Affine)
FUSED(backward, DotSums, Affine2)
