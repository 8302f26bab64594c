// Channels-last: the data is one run of rows, and blocks take whole rows, so that memory is read in long pieces.
// Maps of channels-first data go through the same ring, at the end of this file.
//
// A unit is a share of the chunks of a tile: chunks of p.part rows each, of at most CONSUMERS * WIDTH channels side by
// side. A thread stays with its channels and goes down the rows of a chunk. In a launch blocks draw tickets, first for
// the sums of the units, then for slices of the channels, whose parts are pooled, then for the maps of the units, from
// the far end. Every task waits only for tasks of lower tickets, which running blocks hold, so no launch waits for
// ever, however few blocks run at a time.
//
// RING: one more warp brings the chunks by bulk copies into a ring of p.ahead stages in shared memory (Hopper and
// later). Otherwise each thread loads what it needs itself. Sums and bits are the same.

#ifndef ON_CPU
#undef BOUNDS
#define BOUNDS __launch_bounds__(MOST_THREADS + WARP, 1)
#endif

enum { CONSUMERS = MOST_THREADS, MOST_STAGES = 16, SLICE = WARP };

struct Unit {
    int64 group, share, chunks;  // the tile, the number of the share, and how many chunks the share has
    bool backwards;

    DEVICE Unit(const Parameters& p, int64 number, bool from_the_end) : backwards(from_the_end) {
        share = divide(number, p.by_groups);
        group = number - share * p.groups;
        chunks = (total(p) - share + p.parts - 1) / p.parts;
    }
    DEVICE static int64 total(const Parameters& p) { return (p.items + p.part - 1) / p.part; }
    DEVICE int64 chunk(const Parameters& p, int64 i) const {
        const int64 forwards = share + i * p.parts;
        return backwards ? total(p) - 1 - forwards : forwards;
    }
    // The rows of all its chunks; only the last chunk of the data may be a short one.
    DEVICE static double rows(const Parameters& p, int64 share) {
        const int64 chunks = (total(p) - share + p.parts - 1) / p.parts, last = share + (chunks - 1) * p.parts;
        return (double)((chunks - 1) * p.part + items_in(p, last));
    }
};

// ---- Where a thread finds the items of a chunk ----------------------------------------------------------------------

template <class T, int WIDTH>
struct InRow {
    int64 channel;  // the first of WIDTH
    int column, row, rows;
    int wide;  // values of a row in this tile
    bool inside;

    DEVICE InRow(const Parameters& p, int64 group) {
        const int threads = (int)p.columns;
        const int64 tile = (int64)threads * WIDTH, first = group * tile;
        wide = (int)(p.stride - first < tile ? p.stride - first : tile);
        column = threadIdx.x % threads * WIDTH;
        row = threadIdx.x / threads;
        rows = CONSUMERS / threads;
        channel = first + column;
        inside = column < wide && threadIdx.x < CONSUMERS;
    }
};

// What of an item's data a map or sum does not have is its x.
template <class T, int WIDTH, int INPUTS, bool RING> struct Chunks;

template <class T, int WIDTH, int INPUTS>
struct Chunks<T, WIDTH, INPUTS, false> {
    typedef typename T::Stored Stored;
    int64 offset;
    const Parameters& p;
    const InRow<T, WIDTH>* place;

    DEVICE explicit Chunks(const Parameters& given) : p(given) {}
    DEVICE bool produce(const Unit&) { return false; }
    DEVICE void take(const InRow<T, WIDTH>& at, int64 chunk) {
        place = &at;
        offset = chunk * p.part * p.stride + at.channel;
    }
    DEVICE Item<T, WIDTH> item(int input, int row) const {
        const void* data = input == 0 ? p.x : input == 1 ? p.u : p.v;
        Item<T, WIDTH> item;
        item.load((const Stored*)data + offset + row * p.stride);
        return item;
    }
    DEVICE void leave() {}
};

template <class T, int WIDTH, int INPUTS>
struct Chunks<T, WIDTH, INPUTS, true> {
    typedef typename T::Stored Stored;
    const Parameters& p;
    unsigned char* memory;
    uint64 *full, *empty;
    int stage, wide, column, bytes;
    uint32 phase;

    DEVICE explicit Chunks(const Parameters& given)
        : p(given), stage(0), bytes(bytes_of_input(given)), phase(threadIdx.x < CONSUMERS ? 0 : 1) {
        SHARED(uint64, barriers, 2 * MOST_STAGES);
        DYNAMIC_SHARED(dynamic);
        memory = dynamic;
        full = barriers;
        empty = barriers + MOST_STAGES;
        if (threadIdx.x == 0) {
            for (int i = 0; i < p.ahead; ++i) {
                begin_barrier(full + i, 1);
                begin_barrier(empty + i, CONSUMERS / WARP);
            }
            fence_barriers();
        }
        __syncthreads();
    }
    // In a stage.
    DEVICE static int bytes_of_input(const Parameters& p) {
        const int64 tile = p.columns * WIDTH;
        return (int)(p.part * (p.stride < tile ? p.stride : tile) * (int64)sizeof(Stored));
    }
    DEVICE unsigned char* place(int input) const { return memory + (stage * INPUTS + input) * bytes; }
    DEVICE void next() {
        if (++stage == p.ahead) {
            stage = 0;
            phase ^= 1;
        }
    }

    // The last warp brings all chunks of the unit; false for the threads that take them.
    DEVICE bool produce(const Unit& unit) {
        if (threadIdx.x < CONSUMERS) return false;
        const InRow<T, WIDTH> tile(p, unit.group);
        for (int64 i = 0; i < unit.chunks; ++i, next()) {
            const int64 chunk = unit.chunk(p, i);
            wait_for_phase(empty + stage, phase);
            bring(unit, tile.wide, chunk, items_in(p, chunk));
        }
        return true;
    }
    DEVICE void bring(const Unit& unit, int values, int64 chunk, int rows) {
        const int lane = threadIdx.x % WARP;
        const bool whole = p.groups == 1;  // rows side by side are one piece
        const int pieces = whole ? 1 : rows, piece = (int)sizeof(Stored) * values * (whole ? rows : 1);
        const int64 first = chunk * p.part * p.stride + unit.group * p.columns * WIDTH;
        const int copied = piece & ~15, rest = piece - copied;  // rest: at the end of the data alone
        for (int input = 0; input < INPUTS && lane == 0; ++input) {
            const Stored* from = (const Stored*)data(input) + first;
            for (int k = 0; k < rest / (int)sizeof(Stored); ++k) {
                ((Stored*)(place(input) + copied))[k] = from[copied / (int)sizeof(Stored) + k];
            }
        }
        if (lane == 0) {
            if (rest) fence_async();
            expect_bytes(full + stage, (uint32)(INPUTS * pieces * copied));
        }
        __syncwarp();
        for (int input = 0; input < INPUTS; ++input) {
            const Stored* from = (const Stored*)data(input) + first;
            for (int k = lane; k < pieces; k += WARP) {
                if (copied) copy_bulk(place(input) + (int64)k * piece, from + k * p.stride, copied, full + stage);
            }
        }
    }
    DEVICE const void* data(int input) const { return input == 0 ? p.x : input == 1 ? p.u : p.v; }

    DEVICE void take(const InRow<T, WIDTH>& at, int64) {
        wide = at.wide;
        column = at.column;
        wait_for_phase(full + stage, phase);
    }
    DEVICE Item<T, WIDTH> item(int input, int row) const {
        return *(const Item<T, WIDTH>*)(place(input) + sizeof(Stored) * ((int64)row * wide + column));
    }
    DEVICE void leave() {
        __syncwarp();
        if (threadIdx.x % WARP == 0) arrive(empty + stage);
        next();
    }
};

// ---- Both sweeps over a unit ----------------------------------------------------------------------------------------

// The rows of a chunk that a thread takes and that count: a bit for each, from the lowest bit on. The thread has
// MOST_ROWS at most, as __init__.py has it. Read before the chunk is waited for.
template <class T, int WIDTH, int CHOICE>
DEVICE uint32 marks_of(const Parameters& p, const InRow<T, WIDTH>& place, int64 chunk, int rows) {
    if (CHOICE != MASKED) return 0xffffffffu;
    const uint8* where = p.where + chunk * p.part;
    uint32 marks = 0;
#pragma unroll 4
    for (int row = place.row, k = 0; row < rows; row += place.rows, ++k) marks |= (uint32)(where[row] != 0) << k;
    return marks;
}

template <int CHOICE, class Sums, class T, int WIDTH, class Source>
DEVICE void add_chunk(
    const Source& source, const InRow<T, WIDTH>& place, int rows, uint32 marks, Sums* sums, int& taken) {
    // Loads under way, as many as registers suffice for.
    enum { AT_ONCE = WIDTH == 8 ? 4 / (Sums::INPUTS * Sums::INPUTS) : 8 / Sums::INPUTS };
    for (int row = place.row; row < rows; row += AT_ONCE * place.rows) {
        Item<T, WIDTH> x[AT_ONCE], u[AT_ONCE];
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (row + k * place.rows < rows && (CHOICE != MASKED || marks >> k & 1)) {
                x[k] = source.item(0, row + k * place.rows);
                if (Sums::INPUTS == 2) u[k] = source.item(1, row + k * place.rows);
            }
        }
#pragma unroll
        for (int k = 0; k < AT_ONCE; ++k) {
            if (row + k * place.rows < rows && (CHOICE != MASKED || marks >> k & 1)) {
#pragma unroll
                for (int j = 0; j < WIDTH; ++j) {
                    const typename T::Value of_u = Sums::INPUTS == 2 ? u[k][j] : 0;
                    sums[j].add(x[k][j], of_u, CHOICE != NONZERO || of_u != 0);
                }
                ++taken;
            }
        }
        if (CHOICE == MASKED) marks >>= AT_ONCE;
    }
#pragma unroll
    for (int j = 0; j < WIDTH; ++j) sums[j].add_few();
}

// Sums the chunks of a unit, and stores a Pair for each of its channels.
template <class T, int WIDTH, class Sums, int CHOICE, class Source>
DEVICE void sums_of_unit(const Parameters& p, const Unit& unit, Source& source) {
    enum { COUNTS = CHOICE == MASKED && Sums::INPUTS == 1 };
    DYNAMIC_SHARED(memory);
    SHARED(int, counted, 1);  // rows of the unit that count
    Pair* room = (Pair*)memory;  // for each j, the sums of the j-th channel of every thread
    double* shifts = (double*)(room + WIDTH * CONSUMERS);  // for each j, of every column
    const InRow<T, WIDTH> place(p, unit.group);
    const int threads = (int)p.columns;
    if (!source.produce(unit) && threadIdx.x < CONSUMERS) {
        Sums sums[WIDTH];
        int taken = 0;
        for (int64 i = 0; i < unit.chunks; ++i) {
            const int64 chunk = unit.chunk(p, i);
            const int rows = items_in(p, chunk);
            const uint32 marks = marks_of<T, WIDTH, CHOICE>(p, place, chunk, rows);
            source.take(place, chunk);
            if (place.inside) {
                if (COUNTS ? taken == 0 && marks != 0 : i == 0 && place.row < rows) {
                    int first = place.row;
                    for (uint32 left = marks; COUNTS && !(left & 1); left >>= 1) first += place.rows;
                    const Item<T, WIDTH> own = source.item(0, first);
#pragma unroll
                    for (int j = 0; j < WIDTH; ++j) sums[j].start(p, place.channel + j, (double)own[j]);
                }
                add_chunk<CHOICE, Sums, T, WIDTH>(source, place, rows, marks, sums, taken);
            }
            source.leave();
        }
        wait_for_consumers();  // all have read the ring
        int giver = 0;  // the row of threads that give the shifts: the first that has taken any
        if (COUNTS) {
            int* taken_by = (int*)room;
            if (threadIdx.x % threads == 0) taken_by[place.row] = taken;
            wait_for_consumers();
            int n = 0;
            for (int row = place.rows - 1; row >= 0; --row) {
                n += taken_by[row];
                if (taken_by[row]) giver = row;
            }
            *counted = n;
        }
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            if (place.row == giver) {
                const int column = COUNTS ? threadIdx.x % threads : threadIdx.x;
                shifts[j * threads + column] = place.inside ? sums[j].nearby(p, taken) : 0;
            }
        }
        wait_for_consumers();
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            sums[j].about(shifts[j * threads + threadIdx.x % threads], taken);
            room[j * CONSUMERS + threadIdx.x].first = sums[j].s;
            room[j * CONSUMERS + threadIdx.x].second = sums[j].q;
        }
    }
    __syncthreads();
    for (int half = CONSUMERS / 2; half >= threads; half /= 2) {  // the threads of a column, by halves
        for (int k = threadIdx.x; k < half * WIDTH; k += blockDim.x) {
            Pair& mine = room[k / half * CONSUMERS + k % half];
            const Pair& other = room[k / half * CONSUMERS + k % half + half];
            mine.first += other.first;
            mine.second += other.second;
        }
        __syncthreads();
    }
    const int slots = threads * WIDTH;
    Pair* partials = (Pair*)p.partials + (unit.group * p.parts + unit.share) * slots;
    for (int slot = threadIdx.x; slot < slots; slot += blockDim.x) {
        if (unit.group * slots + slot >= p.channels) break;
        const Pair& sums = room[slot % WIDTH * CONSUMERS + slot / WIDTH];
        const double shift = shifts[slot % WIDTH * threads + slot / WIDTH];
        const double n = COUNTS ? *counted : Unit::rows(p, unit.share);
        const Pair part = Sums::part(n, shift, sums.first, sums.second);
        partials[slot] = COUNTS ? unless_empty(n, part) : part;
    }
    if (COUNTS && threadIdx.x == 0) counts_of(p, unit.group, slots)[unit.share].first = *counted;
    fence_async();  // before bulk copies write where these sums were
}

// The coefficients of a thread's items: always those of its channels.
template <class T, int WIDTH, class Map>
struct OfColumns {
    Map map[WIDTH];

    DEVICE OfColumns(const Parameters& p, const InRow<T, WIDTH>& place) {
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) {
            if (place.inside) map[j] = Map(p, place.channel + j);
        }
    }
    DEVICE void start(int64) {}
    DEVICE const Map& of(int j) { return map[j]; }
    DEVICE void next() {}
};

// `first` is the value with which the first row begins.
template <class T, int WIDTH, class Map, int CHOICE, template <class, int, class> class Maps = OfColumns, class Source>
DEVICE void map_of_unit(
    const Parameters& p, const Unit& unit, Source& source, const uint32* ready, uint32 when, int first = 0) {
    enum { AT_ONCE = Map::INPUTS == 3 || (Map::INPUTS == 2 && WIDTH == 8) ? 2 : 4 };
    if (source.produce(unit) || threadIdx.x >= CONSUMERS) return;
    if (ready) wait_until(ready, when);  // the ring is filling meanwhile
    const InRow<T, WIDTH> place(p, unit.group);
    Maps<T, WIDTH, Map> maps(p, place);
    for (int64 i = 0; i < unit.chunks; ++i) {
        const int64 chunk = unit.chunk(p, i);
        const int rows = items_in(p, chunk);
        maps.start(first + (chunk * p.part + place.row) * WIDTH);
        typename T::Stored* out = (typename T::Stored*)p.out + chunk * p.part * p.stride + place.channel;
        uint32 marks = marks_of<T, WIDTH, CHOICE>(p, place, chunk, rows);
        source.take(place, chunk);
        for (int row = place.row; place.inside && row < rows; row += AT_ONCE * place.rows) {
            Item<T, WIDTH> x[AT_ONCE], u[AT_ONCE], v[AT_ONCE];
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                if (row + k * place.rows < rows) {
                    x[k] = source.item(0, row + k * place.rows);
                    if (Map::INPUTS >= 2) u[k] = source.item(1, row + k * place.rows);
                    if (Map::INPUTS == 3) v[k] = source.item(2, row + k * place.rows);
                }
            }
#pragma unroll
            for (int k = 0; k < AT_ONCE; ++k) {
                if (row + k * place.rows < rows) {
                    typename T::Value result[WIDTH];
#pragma unroll
                    for (int j = 0; j < WIDTH; ++j) {
                        const typename T::Value of_u = Map::INPUTS >= 2 ? u[k][j] : 0;
                        const bool counts = CHOICE == ALL || (marks >> k & 1);
                        result[j] = mapped(maps.of(j), x[k][j], of_u, Map::INPUTS == 3 ? v[k][j] : 0, counts);
                    }
                    maps.next();
                    x[k].set(result);
                    x[k].store_near(out + (row + k * place.rows) * p.stride);
                }
            }
            if (CHOICE == MASKED) marks >>= AT_ONCE;
        }
        source.leave();
    }
}

// Pools the parts of SLICE channels, and applies the formulas.
template <class Sums, int WIDTH, bool COUNTS>
DEVICE void pool_slice(const Parameters& p, int64 slice) {
    enum { ROWS = CONSUMERS / SLICE };
    SHARED(Pair, room, CONSUMERS);
    const int thread = threadIdx.x, slots = (int)p.columns * WIDTH;
    const int64 channel = slice * SLICE + thread % SLICE;
    const bool inside = thread < CONSUMERS && channel < p.channels;
    double origin = 0, s = 0, q = 0;
    const Pair* counts = counts_of(p, 0, slots);  // those of each group, as a row is one position
    Counted all = {(double)p.n, 0};
    if (COUNTS) all = count_parts(p, counts, room);
    if (inside) {
        const int64 group = channel / slots;
        const Pair* partials = (const Pair*)p.partials + group * p.parts * slots + (channel - group * slots);
        origin = Sums::origin(p, channel, load_shared(partials + all.first * slots));
        for (int64 share = thread / SLICE; share < p.parts; share += ROWS) {
            const double n = COUNTS ? load_shared(counts + share).first : Unit::rows(p, share);
            Sums::pool(n, origin, load_shared(partials + share * slots), s, q);
        }
        room[thread].first = s;
        room[thread].second = q;
    }
    __syncthreads();
    if (thread < SLICE && inside) {
        for (int row = 1; row < ROWS; ++row) {
            s += room[row * SLICE + thread].first;
            q += room[row * SLICE + thread].second;
        }
        const Pair sums = Sums::pooled(all.n, origin, s, q);
        Sums::finish(p, channel, COUNTS ? unless_empty(all.n, sums) : sums);
    }
}

// ---- A launch -------------------------------------------------------------------------------------------------------
// p.tickets counts: the tickets drawn; for each pass over the sums, the units that are summed and the slices that are
// pooled; the blocks that have found no more. All are zero before and after a launch.

enum { DRAWN, SUMMED, POOLED, PASS = 2, LEFT = 5 };

// The parameters of the second pass over float64: sums about a mean that is nearly right, as others lose digits.
template <bool AGAIN>
DEVICE Parameters of_pass(const Parameters& p, bool again) {
    Parameters q = p;
    if (AGAIN && again) q.shift = p.mean;
    return q;
}

template <class T, int WIDTH, class Sums, class Map, bool MAP, bool RING, int CHOICE, int MAP_CHOICE>
DEVICE void rows_in_turn(const Parameters& p) {
    enum { PASSES = MAP && Sums::INPUTS == 1 && sizeof(typename T::Stored) == 8 ? 2 : 1 };
    SHARED(uint32, ticket, 1);
    Chunks<T, WIDTH, Sums::INPUTS, RING> source(p);
    const uint32 units = (uint32)(p.groups * p.parts), slices = (uint32)((p.channels + SLICE - 1) / SLICE);
    const uint32 tasks = PASSES * (units + slices) + (MAP ? units : 0);
    while (draw(p.tickets + DRAWN, tasks, ticket)) {
        uint32 task = *ticket;
        const bool again = PASSES == 2 && task >= units + slices;
        uint32* counts = p.tickets + (again ? PASS : 0);
        if (again) task -= units + slices;
        const Parameters q = of_pass<PASSES == 2>(p, again);
        if (task < units) {
            if (again) wait_until(p.tickets + POOLED, slices);
            sums_of_unit<T, WIDTH, Sums, CHOICE>(q, Unit(p, task, false), source);
            count_up(counts + SUMMED);
        } else if (task < units + slices) {
            wait_until(counts + SUMMED, units);
            pool_slice<Sums, WIDTH, CHOICE == MASKED && Sums::INPUTS == 1>(q, task - units);
            count_up(counts + POOLED);
        } else if constexpr (MAP) {
            const Unit unit(p, task - units - slices, true);
            map_of_unit<T, WIDTH, Map, MAP_CHOICE>(p, unit, source, counts + POOLED, slices);
        }
    }
    if (last_to_arrive(p.tickets + LEFT, gridDim.x, ticket) && threadIdx.x < LEFT) p.tickets[threadIdx.x] = 0;
}

template <class T, int WIDTH, class Map, bool RING, int CHOICE>
DEVICE void map_rows(const Parameters& p) {
    Chunks<T, WIDTH, Map::INPUTS, RING> source(p);
    map_of_unit<T, WIDTH, Map, CHOICE>(p, Unit(p, blockIdx.x, true), source, nullptr, 0);
}

// ---- Maps of channels-first data, by the ring -----------------------------------------------------------------------
// The data is one run of items of 16 bytes, each a row of p.stride = WIDTH values. A plane may end within an item. The
// few values before the first item and behind the last are loaded by themselves.

// The values before the first item.
template <class Stored>
DEVICE int head_of(const Parameters& p) {
    return (int)((16 - (uint64)p.x % 16) % 16 / sizeof(Stored));
}

// Where a value lies.
struct InPlane {
    int channel, place;

    DEVICE InPlane(const Parameters& p, int64 value) {
        const int64 planes = divide(value, p.by_plane);
        channel = (int)((uint32)planes % (uint32)p.channels);
        place = (int)(value - planes * p.plane);
    }
};

// The coefficients of all channels, in shared memory behind the ring.
template <class T, int WIDTH, class Map>
DEVICE Map* table_of(const Parameters& p) {
    DYNAMIC_SHARED(memory);
    return (Map*)(memory + p.ahead * Map::INPUTS * Chunks<T, WIDTH, Map::INPUTS, true>::bytes_of_input(p));
}

// The coefficients of a thread's items: those of the planes in which the items lie. No plane is shorter than an item.
template <class T, int WIDTH, class Map>
struct OfPlanes {
    const Map* table;
    Map map;
    InPlane at, step;  // this item, and from an item to the thread's next
    int channels, plane;
    const Parameters& p;

    DEVICE OfPlanes(const Parameters& given, const InRow<T, WIDTH>& row)
        : table(table_of<T, WIDTH, Map>(given)), at(given, 0), step(given, (int64)row.rows * WIDTH),
          channels((int)given.channels), plane((int)given.plane), p(given) {}
    DEVICE void start(int64 value) {
        at = InPlane(p, value);
        map = table[at.channel];
    }
    DEVICE const Map& of(int j) {
        if (at.place + j == plane) map = table[at.channel + 1 == channels ? 0 : at.channel + 1];
        return map;
    }
    DEVICE void next() {
        at.place += step.place;
        at.channel += step.channel;
        if (at.place >= plane) {
            at.place -= plane;
            ++at.channel;
        }
        if (at.channel >= channels) at.channel -= channels;
        map = table[at.channel];
    }
};

template <class T, int WIDTH, class Map>
DEVICE void map_planes(const Parameters& p) {
    typedef typename T::Stored Stored;
    const int head = head_of<Stored>(p);
    Parameters q = p;
    q.x = (const Stored*)p.x + head;
    q.u = (const Stored*)p.u + head;
    q.v = (const Stored*)p.v + head;
    q.out = (Stored*)p.out + head;
    Map* table = table_of<T, WIDTH, Map>(p);
    for (int64 channel = threadIdx.x; channel < p.channels; channel += blockDim.x) table[channel] = Map(p, channel);
    Chunks<T, WIDTH, Map::INPUTS, true> source(q);  // and a barrier: the table is there
    const int64 end = head + p.items * WIDTH;
    const InPlane last(p, end);
    const int tail = last.place ? (int)p.plane - last.place : 0;
    if (blockIdx.x == 0 && (int)threadIdx.x < head + tail) {
        const int64 value = (int)threadIdx.x < head ? threadIdx.x : end + threadIdx.x - head;
        const Map& map = table[InPlane(p, value).channel];
        Item<T, 1> x, u, v;
        x.load((const Stored*)p.x + value);
        if (Map::INPUTS >= 2) u.load((const Stored*)p.u + value);
        if (Map::INPUTS == 3) v.load((const Stored*)p.v + value);
        const typename T::Value y = mapped(map, x[0], Map::INPUTS >= 2 ? u[0] : 0, Map::INPUTS == 3 ? v[0] : 0);
        x.set(&y);
        x.store((Stored*)p.out + value);
    }
    map_of_unit<T, WIDTH, Map, ALL, OfPlanes>(q, Unit(p, blockIdx.x, true), source, nullptr, 0, head);
}

#define PLANE_MAP(name, map)                                                                                           \
    template <class T, int WIDTH> DEVICE void name##_ring_planes(const Parameters& p) {                                \
        map_planes<T, WIDTH, map<T>>(p);                                                                               \
    }
#define ROW_SUMS(name, sums, map, both, way, ring, choice, of_map)                                                     \
    template <class T, int WIDTH> DEVICE void name##_##way(const Parameters& p) {                                      \
        rows_in_turn<T, WIDTH, sums<T>, map<T>, both, ring, choice, of_map>(p);                                        \
    }
#define ROW_MAP(name, map, way, ring, choice)                                                                          \
    template <class T, int WIDTH> DEVICE void name##_##way(const Parameters& p) {                                      \
        map_rows<T, WIDTH, map<T>, ring, choice>(p);                                                                   \
    }
#define ROWS(way, ring)                                                                                                \
    template <class T, int WIDTH> DEVICE void affine_fixed_##way(const Parameters& p) {                                \
        AffineFixed<T>::keep(p);                                                                                       \
        map_rows<T, WIDTH, AffineFixed<T>, ring, ALL>(p);                                                              \
    }                                                                                                                  \
    ROW_SUMS(moments, MomentSums, Affine, false, way, ring, ALL, ALL)                                                  \
    ROW_SUMS(dots, DotSums, Affine2, false, way, ring, ALL, ALL)                                                       \
    ROW_SUMS(forward, MomentSums, Affine, true, way, ring, ALL, ALL)                                                   \
    ROW_SUMS(backward, DotSums, Affine2, true, way, ring, ALL, ALL)                                                    \
    ROW_MAP(affine, Affine, way, ring, ALL)                                                                            \
    ROW_MAP(affine2, Affine2, way, ring, ALL)                                                                          \
    ROW_MAP(affine3, Affine3, way, ring, ALL)                                                                          \
    ROW_SUMS(moments_masked, MomentSums, Affine, false, way, ring, MASKED, ALL)                                        \
    ROW_SUMS(dots_masked, DotSums, Affine2, false, way, ring, MASKED, ALL)                                             \
    ROW_SUMS(dots_nonzero, DotSums, Affine2, false, way, ring, NONZERO, ALL)                                           \
    ROW_SUMS(forward_masked, MomentSums, Affine, true, way, ring, MASKED, ALL)                                         \
    ROW_SUMS(backward_masked, DotSums, Affine2, true, way, ring, NONZERO, MASKED)                                      \
    ROW_MAP(affine2_masked, Affine2, way, ring, MASKED)                                                                \
    ROW_MAP(affine3_masked, Affine3, way, ring, MASKED)

ROWS(rows, false)
ROWS(ring, true)

template <class T, int WIDTH> DEVICE void affine_fixed_ring_planes(const Parameters& p) {
    AffineFixed<T>::keep(p);
    map_planes<T, WIDTH, AffineFixed<T>>(p);
}
PLANE_MAP(affine, Affine)
PLANE_MAP(affine2, Affine2)
PLANE_MAP(affine3, Affine3)
