// A forward or a backward in one launch that reads each value from memory once. It stands behind sweeps.cu.
//
// Resident: a block takes one channel (planes) or some channels side by side (lines), copies their values into shared
// memory, sums them up while they arrive, applies the formulas, and maps what it has kept.
//
// Pipeline, for channels that are too large for that: blocks draw tickets for tasks, which are those of the sweeps. The
// map of a part comes some tasks behind its sums, so that it finds its values in the cache.

#ifndef ON_CPU
#undef BOUNDS
#define BOUNDS __launch_bounds__(MOST_THREADS, 3)  // blocks that have room: 80 registers for a thread
#endif

// ---- The items of a thread: where they lie in the data, and their places in shared memory ---------------------------
// A thread reads from shared memory only what it has copied there itself, so no barrier stands between. The values of a
// small channel (7 by 7 planes of 32 images: 1568 of them) could stay in registers instead. Then a kernel would have a
// fixed number of them, and as many registers as loads under way. Which is faster has to be measured.

template <int WIDTH>
struct InPlanes {
    enum { CHANNELS = 1 };  // that the values of an item belong to
    Walk<WIDTH> walk;
    int64 channel;
    int columns, row, slot, slots;  // slot: the item's number in the part, which has so many
    bool inside;

    DEVICE InPlanes(const Parameters& p, const Task& task) : walk(p, task.group, task.first + threadIdx.x) {
        channel = task.group;
        columns = 1;
        row = slot = threadIdx.x;
        slots = task.count;
        inside = true;
    }
    // A value of the part.
    DEVICE static int64 first(const Parameters& p, const Task& task) {
        return Walk<WIDTH>(p, task.group, task.first).offset;
    }
    DEVICE int64 offset() const { return walk.offset; }
    DEVICE bool more() const { return slot < slots; }
    DEVICE void next() {
        walk.next();
        slot += blockDim.x;
    }
};

// Lines: a row is one value of each channel, an item is one of each of WIDTH channels. A group is the channels of
// p.columns threads side by side. A thread stays with its channels and goes down the rows.
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

template <int WIDTH>
struct InLines {
    enum { CHANNELS = WIDTH };
    int64 channel, place, step;
    int columns, row, slot, slots;
    bool inside;

    DEVICE InLines(const Parameters& p, const Task& task) {
        const Column<WIDTH> column(p, task);
        channel = column.channel;
        place = column.offset;
        step = column.step;
        columns = column.threads;
        row = column.row;
        slot = threadIdx.x;
        slots = task.count * columns;
        inside = column.inside;
    }
    // The first value of each channel in the part.
    DEVICE int64 first(const Parameters& p, const Task& task) const { return task.first * p.stride + channel; }
    DEVICE int64 offset() const { return place; }
    DEVICE bool more() const { return inside && slot < slots; }
    DEVICE void next() {
        place += step;
        slot += blockDim.x;
    }
};

// Shared memory for all items of a part, or for the last ones as in a ring: u stands behind x.
template <class Item>
struct Kept {
    Item* items;
    int behind, mask;

    DEVICE Item& x(int slot) const { return items[slot & mask]; }
    DEVICE Item& u(int slot) const { return items[behind + (slot & mask)]; }
};

// ---- Both sweeps over a part, whose values are copied into shared memory ROUNDS rounds of UNROLL items ahead --------

template <int INPUTS, bool LAST, class Item, class Place>
DEVICE void copy_round(const Parameters& p, Place& place, const Kept<Item>& kept) {
    typedef typename Item::Stored Stored;
#pragma unroll
    for (int k = 0; k < Item::UNROLL; ++k) {
        if (place.more()) {
            copy_later<sizeof(Item), LAST>(&kept.x(place.slot), (const Stored*)p.x + place.offset());
            if (INPUTS == 2) copy_later<sizeof(Item), LAST>(&kept.u(place.slot), (const Stored*)p.u + place.offset());
            place.next();
        }
    }
    end_round();
}

template <class Sums, int WIDTH, class Item, class Place>
DEVICE void add_round(const Place& start, const Kept<Item>& kept, int& slot, Sums* sums) {
#pragma unroll
    for (int k = 0; k < Item::UNROLL; ++k) {
        if (slot < start.slots) {
            const Item x = kept.x(slot), u = Sums::INPUTS == 2 ? kept.u(slot) : x;
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sums[Place::CHANNELS == 1 ? 0 : j].add(x[j], u[j]);
            if (sizeof(typename Sums::Summed) == 4 && Place::CHANNELS < WIDTH) sums[0].add_few();  // as sums_of_planes
            slot += blockDim.x;
        }
    }
#pragma unroll
    for (int j = 0; j < Place::CHANNELS; ++j) sums[j].add_few();
}

// The sums of a part. The threads of row j get those of the j-th channel of their column.
template <class T, int WIDTH, class Sums, int ROUNDS, class Item, class Place>
DEVICE Pair sums_of_part(
    const Parameters& p, const Task& task, const Place& start, const Kept<Item>& kept, Pair* room) {
    enum { CHANNELS = Place::CHANNELS, TWICE = Sums::INPUTS == 1 && sizeof(typename T::Stored) == 8 };
    const int threads = blockDim.x, taken = start.more() ? (start.slots - start.slot + threads - 1) / threads : 0;
    Sums sums[CHANNELS];
    double shift[CHANNELS] = {};
    Place ahead = start;
    for (int round = 0; round < ROUNDS; ++round) copy_round<Sums::INPUTS, false>(p, ahead, kept);
    if (start.inside) {
        const typename T::Stored* first = (const typename T::Stored*)p.x + start.first(p, task);
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j) shift[j] = Sums::shift_of(p, start.channel + j, (double)T::value(first[j]));
    }
    for (int slot = start.slot; start.inside && slot < start.slots;) {
        copy_round<Sums::INPUTS, false>(p, ahead, kept);
        wait_for_rounds<ROUNDS>();
        if (slot == start.slot) {
            const Item own = kept.x(slot);
#pragma unroll
            for (int j = 0; j < CHANNELS; ++j) sums[j].start(p, start.channel + j, (double)own[j]);
        }
        add_round<Sums, WIDTH>(start, kept, slot, sums);
    }
    Pair mine = {0, 0};
    for (int again = TWICE; again >= 0; --again) {
#pragma unroll
        for (int j = 0; j < CHANNELS; ++j) {
            sums[j].about(shift[j], taken * (WIDTH / CHANNELS));
            sum_over_block(sums[j].s, sums[j].q, start.columns, room);
            const Pair part = Sums::part((double)task.count * (WIDTH / CHANNELS), shift[j], sums[j].s, sums[j].q);
            if (start.row == j || CHANNELS == 1) mine = part;
            if (again) {  // (E1) of float64: sums about a mean that is nearly right, as others lose digits
                shift[j] = Sums::shift_of(p, start.channel + j, part.first);
                sums[j] = Sums();
                sums[j].start(p, start.channel + j, shift[j]);
            }
        }
        for (int slot = start.slot; again && start.inside && slot < start.slots;) {
            add_round<Sums, WIDTH>(start, kept, slot, sums);
        }
    }
    return mine;
}

template <class T, int WIDTH, class Map, int ROUNDS, bool COPY, class Item, class Place>
DEVICE void map_of_part(const Parameters& p, const Place& start, const Kept<Item>& kept) {
    enum { CHANNELS = Place::CHANNELS };
    if (!start.more()) return;
    Place ahead = start;
    const bool first = COPY && CHANNELS == 1;  // before the coefficients, where registers suffice for both
    for (int round = 0; first && round < ROUNDS; ++round) copy_round<Map::INPUTS, true>(p, ahead, kept);
    Map map[CHANNELS];
#pragma unroll
    for (int j = 0; j < CHANNELS; ++j) map[j] = Map(p, start.channel + j);
    for (int round = 0; COPY && !first && round < ROUNDS; ++round) copy_round<Map::INPUTS, true>(p, ahead, kept);
    for (Place place = start; place.more();) {
        if (COPY) {
            copy_round<Map::INPUTS, true>(p, ahead, kept);
            wait_for_rounds<ROUNDS>();
        }
#pragma unroll
        for (int k = 0; k < Item::UNROLL; ++k) {
            if (place.more()) {
                const Item x = kept.x(place.slot), u = Map::INPUTS == 2 ? kept.u(place.slot) : x;
                typename T::Value result[WIDTH];
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) result[j] = map[CHANNELS == 1 ? 0 : j].of(x[j], u[j]);
                Item y;
                y.set(result);
                y.store((typename T::Stored*)p.out + place.offset());
                place.next();
            }
        }
    }
}

// ---- Resident -------------------------------------------------------------------------------------------------------

template <class T, int WIDTH, class Sums, class Map, class Place>
DEVICE void resident(const Parameters& p) {
    enum { ROUNDS = 3 };
    SHARED(Pair, room, MOST_THREADS);
    DYNAMIC_SHARED(memory);
    const Task task = task_of(p, blockIdx.x, 0);
    const Place start(p, task);
    const Kept<Item<T, WIDTH>> kept = {(Item<T, WIDTH>*)memory, start.slots, -1};
    const Pair sums = sums_of_part<T, WIDTH, Sums, ROUNDS>(p, task, start, kept, room);
    if (start.inside && start.row < Place::CHANNELS) Sums::finish(p, start.channel + start.row, sums);
    __syncthreads();
    map_of_part<T, WIDTH, Map, ROUNDS, false>(p, start, kept);
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

template <class T, int WIDTH, class Sums, class Map, class Place>
DEVICE void pipeline(const Parameters& p) {
    typedef Item<T, WIDTH> Item;
    enum { ROUNDS = Sums::INPUTS == 1 ? 3 : 1, RING = (ROUNDS + 1) * Item::UNROLL, CHANNELS = Place::CHANNELS };
    SHARED(uint32, ticket, 1);
    SHARED(Pair, room, MOST_THREADS);
    DYNAMIC_SHARED(memory);
    const Kept<Item> kept = {(Item*)memory, RING * (int)blockDim.x, RING * (int)blockDim.x - 1};
    while (draw(p.tickets + 2 * p.groups, 2 * (uint32)(p.groups * p.parts), ticket)) {
        const Step step = step_of(p, *ticket);
        const Task task = task_of(p, step.group, step.part);
        const Place start(p, task);
        if (step.sums) {
            const Pair sums = sums_of_part<T, WIDTH, Sums, ROUNDS>(p, task, start, kept, room);
            const int64 channel = start.channel + start.row % CHANNELS;
            const bool last = finish<Sums, 2>(p, task, start.columns * CHANNELS, WIDTH / CHANNELS, channel, sums, room);
            if (last) publish(ready(p, step_of(p, *ticket)));  // read again: a register less meanwhile
        } else {
            wait_for(ready(p, step));
            map_of_part<T, WIDTH, Map, ROUNDS, true>(p, start, kept);
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
        pipeline<T, WIDTH, sums<T>, map<T>, InPlanes<WIDTH>>(p);                                                       \
    }

FUSED(forward, MomentSums, Affine)
FUSED(backward, DotSums, Affine2)
