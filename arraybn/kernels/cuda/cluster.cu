// A forward or a backward in one launch by clusters of blocks, which keep a channel in their shared memory together:
// channels-first, Hopper and later. It stands behind sweeps.cu.
//
// The items of a channel are cut into pieces of p.part items; each warp of a cluster has p.ahead of them side by side.
// A warp brings its pieces by bulk copies, sums them while they arrive, and maps them from where they are; a piece that
// is mapped makes room for the warp's piece of the next channel. Warps meet once in a block and blocks once in a
// cluster, to pool their sums. Parts are pooled in the order of their numbers, so the bits are the same each time.
//
// Where planes are no multiple of 16 bytes, as bulk copies need them, a cluster keeps a group of p.columns channels,
// side by side in a sample, and takes one after the other. Then an item is one value, and pieces have whole runs of
// p.columns planes. Otherwise p.columns is 1.

enum { MOST_WARPS = 16, MOST_PIECES = 8, MOST_BLOCKS = 16 };

#ifndef ON_CPU
#undef BOUNDS
#define BOUNDS __launch_bounds__(MOST_WARPS * WARP, 1)
#endif
#undef ENTRY
#define ENTRY(kernel, type, width) CLUSTER_KERNEL(kernel, type, width, kernel##_blocks)

// How many values of a channel some warps have, from an item on.
template <int WIDTH>
DEVICE double values_in(const Parameters& p, int64 first, int64 warps) {
    const int64 items = warps * p.ahead * p.part, left = p.items - first;
    const int64 values = (left < 0 ? 0 : left < items ? left : items) * WIDTH;
    return (double)(WIDTH == 1 ? values / p.columns : values);
}

// Where a lane finds its items of a channel of a group: in a piece, and in the data.
template <int WIDTH>
struct Places {
    int item, items;
    Walk<WIDTH> walk;

    DEVICE Places(const Parameters& p, int64 channel, int64 start, int count, int lane)
        : item(lane), items(count), walk(p, channel, start + lane, WARP) {}
    DEVICE bool more() const { return item < items; }
    DEVICE int64 offset() const { return walk.offset; }
    DEVICE void next() {
        item += WARP;
        walk.next();
    }
};

template <>
struct Places<1> {
    int item, place, plane, run, left;
    int64 in_data, stride;

    DEVICE Places(const Parameters& p, int64 channel, int64 start, int count, int lane)
        : plane((int)(p.plane / p.columns)), run((int)p.plane), stride(p.stride) {
        place = lane;
        item = (int)(channel % p.columns) * plane + lane;
        left = count / (int)p.columns - lane;
        in_data = divide(start, p.by_plane) * stride + channel * plane + lane;
        wrap();
    }
    DEVICE bool more() const { return left > 0; }
    DEVICE int64 offset() const { return in_data; }
    DEVICE void next() {
        left -= WARP;
        place += WARP;
        item += WARP;
        in_data += WARP;
        wrap();
    }
    DEVICE void wrap() {  // into the next run
        while (place >= plane) {
            place -= plane;
            item += run - plane;
            in_data += stride - plane;
        }
    }
};

// The pieces of a warp.
template <class T, int WIDTH, int INPUTS>
struct Pieces {
    typedef typename T::Stored Stored;
    typedef Item<T, WIDTH> Kept;
    const Parameters& p;
    unsigned char* memory;
    uint64* full;
    int64 first;  // item of the group
    int lane;

    DEVICE explicit Pieces(const Parameters& given) : p(given), lane(threadIdx.x % WARP) {
        SHARED(uint64, barriers, MOST_WARPS * MOST_PIECES);
        DYNAMIC_SHARED(dynamic);
        const int64 warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
        memory = dynamic + warp * p.ahead * INPUTS * bytes();
        full = barriers + warp * p.ahead;
        first = (cluster_rank() * warps + warp) * p.ahead * p.part;
        if (lane == 0) {
            for (int k = 0; k < p.ahead; ++k) begin_barrier(full + k, 1);
            fence_barriers();
        }
        __syncwarp();
    }
    DEVICE int64 bytes() const { return p.part * (int64)sizeof(Kept); }  // of a piece
    DEVICE int64 start(int k) const { return first + k * p.part; }
    DEVICE int items(int k) const {
        const int64 left = p.items - start(k);
        return (int)(left < 0 ? 0 : left < p.part ? left : p.part);
    }
    DEVICE Places<WIDTH> places(int64 channel, int k) const {
        return Places<WIDTH>(p, channel, start(k), items(k), lane);
    }
    DEVICE const Kept& item(int k, int input, int i) const {
        return ((const Kept*)(memory + (k * INPUTS + input) * bytes()))[i];
    }

    // A copy for each plane, or run of planes, that the piece has a share of.
    DEVICE void bring(int64 group, int k) {
        const int64 begin = start(k), end = begin + items(k);
        if (begin >= end) return;
        if (lane == 0) expect_bytes(full + k, (uint32)(INPUTS * (end - begin) * sizeof(Kept)));
        __syncwarp();
        for (int64 plane = divide(begin, p.by_plane) + lane; plane * p.plane < end; plane += WARP) {
            const int64 top = plane * p.plane, from = begin < top ? top : begin;
            const int64 to = end < top + p.plane ? end : top + p.plane;
            const int64 offset = plane * p.stride + (group * p.plane + from - top) * WIDTH;
            copy_bulk((void*)&item(k, 0, (int)(from - begin)), (const Stored*)p.x + offset,
                      (int)((to - from) * sizeof(Kept)), full + k);
            if (INPUTS == 2) {
                copy_bulk((void*)&item(k, 1, (int)(from - begin)), (const Stored*)p.u + offset,
                          (int)((to - from) * sizeof(Kept)), full + k);
            }
        }
    }
};

// Adds what this thread has of its warp's pieces; how many values that is. `started` sums keep their shift.
template <class T, int WIDTH, class Sums>
DEVICE int add_pieces(
    const Pieces<T, WIDTH, Sums::INPUTS>& pieces, int64 channel, uint32 phase, bool started, Sums& sums) {
    const Parameters& p = pieces.p;
    int taken = 0;
    for (int k = 0; k < p.ahead; ++k) {
        if (pieces.items(k) == 0) break;
        wait_for_phase(pieces.full + k, phase);
        Places<WIDTH> at = pieces.places(channel, k);
        if (k == 0 && !started && at.more()) sums.start(p, channel, (double)pieces.item(0, 0, at.item)[0]);
#pragma unroll 4
        for (; at.more(); at.next()) {
            const Item<T, WIDTH> x = pieces.item(k, 0, at.item);
            const Item<T, WIDTH> u = Sums::INPUTS == 2 ? pieces.item(k, 1, at.item) : x;
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) sums.add(x[j], u[j]);
            if (sizeof(typename Sums::Summed) == 4) sums.add_few();  // as sums_of_planes
            taken += WIDTH;
        }
        sums.add_few();
    }
    return taken;
}

// Sums s and q over a warp.
DEVICE void sum_over_warp(double& s, double& q) {
    for (int step = WARP / 2; step; step /= 2) {
        s += __shfl_xor_sync(0xffffffffu, s, step);
        q += __shfl_xor_sync(0xffffffffu, q, step);
    }
}

// Pools the sums of all threads of the cluster. `of_warps` and `of_blocks` have a place for each warp of the block and
// for each block; of_blocks must be another one than in the call before, because a block may be ahead of the others.
template <int WIDTH, class Sums>
DEVICE Pair pooled(const Parameters& p, int64 channel, Sums& sums, int taken, Pair* of_warps, Pair* of_blocks) {
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    const int64 each = p.ahead * p.part, first = cluster_rank() * warps * each;  // items
    const double shift = __shfl_sync(0xffffffffu, sums.nearby(p, taken), 0);
    sums.about(shift, taken);
    sum_over_warp(sums.s, sums.q);
    if (lane == 0) of_warps[warp] = Sums::part(values_in<WIDTH>(p, first + warp * each, 1), shift, sums.s, sums.q);
    __syncthreads();
    if (warp == 0) {
        const double n = lane < warps ? values_in<WIDTH>(p, first + lane * each, 1) : 0;
        const double origin = Sums::origin(p, channel, of_warps[0]);
        double s = 0, q = 0;
        if (n > 0) Sums::pool(n, origin, of_warps[lane], s, q);
        sum_over_warp(s, q);
        const Pair block = Sums::pooled(values_in<WIDTH>(p, first, warps), origin, s, q);
        if (lane < cluster_blocks()) store_in_block(lane, of_blocks + cluster_rank(), block);
    }
    wait_for_cluster();
    const double origin = Sums::origin(p, channel, of_blocks[0]);
    double s = 0, q = 0;
    for (uint32 rank = 0; rank < cluster_blocks(); ++rank) {
        const double n = values_in<WIDTH>(p, rank * warps * each, warps);
        if (n > 0) Sums::pool(n, origin, of_blocks[rank], s, q);
    }
    return Sums::pooled((double)p.n, origin, s, q);
}

template <class T, int WIDTH, class Map>
DEVICE void map_piece(const Pieces<T, WIDTH, Map::INPUTS>& pieces, int64 channel, int k, const Map& map) {
    Places<WIDTH> at = pieces.places(channel, k);
#pragma unroll 4
    for (; at.more(); at.next()) {
        const Item<T, WIDTH> x = pieces.item(k, 0, at.item), u = Map::INPUTS == 2 ? pieces.item(k, 1, at.item) : x;
        typename T::Value result[WIDTH];
#pragma unroll
        for (int j = 0; j < WIDTH; ++j) result[j] = map.of(x[j], u[j]);
        Item<T, WIDTH> y;
        y.set(result);
        y.store_near((typename T::Stored*)pieces.p.out + at.offset());
    }
}

template <class T, int WIDTH, class Sums, class Map>
DEVICE void in_clusters(const Parameters& p) {
    enum { PASSES = Sums::INPUTS == 1 && sizeof(typename T::Stored) == 8 ? 2 : 1 };
    SHARED(Pair, of_warps, MOST_WARPS);
    SHARED(Pair, of_blocks, 2 * MOST_BLOCKS);
    const int side = WIDTH == 1 ? (int)p.columns : 1;
    const int64 clusters = gridDim.x / cluster_blocks(), first = blockIdx.x / cluster_blocks();
    Pieces<T, WIDTH, Sums::INPUTS> pieces(p);
    for (int k = 0; k < p.ahead; ++k) pieces.bring(first, k);
    wait_for_cluster();  // all blocks have begun, so they have shared memory
    uint32 phase = 0, turn = 0;
    for (int64 group = first; group < p.groups; group += clusters, phase ^= 1) {
        for (int64 channel = group * side; channel < (group + 1) * side; ++channel) {
            Pair found = {0, 0};
            for (int pass = 0; pass < PASSES; ++pass, turn ^= 1) {  // (E1) of float64 twice, as sums_of_part
                Sums sums;
                if (pass > 0) sums.start(p, channel, found.first);
                const int taken = add_pieces<T, WIDTH>(pieces, channel, phase, pass > 0, sums);
                found = pooled<WIDTH>(p, channel, sums, taken, of_warps, of_blocks + turn * MOST_BLOCKS);
            }
            if (cluster_rank() == 0 && threadIdx.x == 0) Sums::finish(p, channel, found);
            const Map map(p, channel, found);
            const bool filled = channel + 1 == (group + 1) * side && group + clusters < p.groups;  // again
            for (int k = 0; k < p.ahead; ++k) {
                map_piece<T, WIDTH>(pieces, channel, k, map);
                __syncwarp();  // all have read it
                if (filled) pieces.bring(group + clusters, k);
            }
        }
    }
}

#define CLUSTERS(blocks)                                                                                               \
    enum { forward_cluster_##blocks##_blocks = blocks, backward_cluster_##blocks##_blocks = blocks };                  \
    template <class T, int WIDTH> DEVICE void forward_cluster_##blocks(const Parameters& p) {                          \
        in_clusters<T, WIDTH, MomentSums<T>, Affine<T>>(p);                                                            \
    }                                                                                                                  \
    template <class T, int WIDTH> DEVICE void backward_cluster_##blocks(const Parameters& p) {                         \
        in_clusters<T, WIDTH, DotSums<T>, Affine2<T>>(p);                                                              \
    }

CLUSTERS(1)
CLUSTERS(2)
CLUSTERS(4)
CLUSTERS(8)
CLUSTERS(16)
