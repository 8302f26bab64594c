// Exact mode (E10): the record of Sx and Sx^2, or of Su and Su*x, in integers, and maps of which each operation rounds
// by itself.
//
// Adding a power of two that is large enough, a magic number, puts a value on a grid: the bits of the sum, read as an
// integer, then count grid steps. Integers add in any order. The grid of values below 2^top has the step 2^(top - 50);
// it holds values of up to SPAN exponents. A product takes two grids, 2^(2 top - 50) and 2^(2 top - 101).
//
// A thread adds the steps of its values in registers. The threads of a warp have the same grids. They look at each
// batch of values first: if a value does not fit, the warp hands over its sums and chooses other grids. A batch that
// spans more than SPAN exponents is gone through once for each SPAN of them.
// The sums go to limbs of 32 bits in shared memory. At its end a block adds these limbs to the record, which has an
// int64 for each row and channel (arraybn/exact.py), by atomics, in any order.

enum {
    VALUE_LIMBS = 9, VALUE_UNIT = -160, PRODUCT_LIMBS = 18, PRODUCT_UNIT = -320, KINDS = 3,
    PRODUCTS = VALUE_LIMBS, VALUE_KINDS = PRODUCTS + PRODUCT_LIMBS, PRODUCT_KINDS = VALUE_KINDS + KINDS,
    RECORD_ROWS = PRODUCT_KINDS + KINDS,
    TILE = 64,          // channels at most whose limbs a block keeps; TILE in exact.py
    MOST_STEPS = 8160,  // values whose steps fit an int64: at most 2^50 each
    HEADROOM = 2,       // exponents above the largest of the first values
};
const uint32 ALL_LANES = 0xffffffffu, INFINITE = 0x7f800000u;

// Exponents that a grid holds: 51 less the bits of a value.
template <class T> struct Span { enum { EXPONENTS = 27 }; };
template <> struct Span<float16> { enum { EXPONENTS = 40 }; };
template <> struct Span<bfloat16> { enum { EXPONENTS = 43 }; };

DEVICE double power_of_two(int exponent) { return words_to_double(0, (uint32)(exponent + 1023) << 20); }
DEVICE uint32 magnitude(float value) { return float_to_bits(value) & 0x7fffffffu; }

// ---- Grids ----------------------------------------------------------------------------------------------------------

// 1.5 * 2^(exponent + 52): added to a value, its last bit counts 2^exponent.
DEVICE double magic(int exponent) { return words_to_double(0, (uint32)(exponent + 52 + 1023) << 20 | 1u << 19); }

DEVICE int exponent_of(uint32 bits) {  // e with |value| < 2^e
    const uint32 field = bits >> 23;
    return (int)(field < 1 ? 1 : field > 254 ? 254 : field) - 126;
}

// The magnitudes of some values.
struct Range {
    uint32 high, low;  // the bits of the largest; of the smallest but 0, less one

    DEVICE Range() : high(0), low(0xffffffffu) {}
    DEVICE void take(uint32 bits) {
        high = bits > high ? bits : high;
        low = bits - 1 < low ? bits - 1 : low;
    }
    DEVICE void over_warp() {
        for (int step = WARP / 2; step > 0; step /= 2) {
            const uint32 other_high = __shfl_xor_sync(ALL_LANES, high, step);
            const uint32 other_low = __shfl_xor_sync(ALL_LANES, low, step);
            high = other_high > high ? other_high : high;
            low = other_low < low ? other_low : low;
        }
    }
    DEVICE int top() const { return exponent_of(high); }
    DEVICE int bottom() const { return exponent_of(low + 1); }
    DEVICE int least() const { return bottom() <= -125 ? -149 : bottom() - 1; }  // |value| >= 2^least, or 0
};

// The values that a grid holds: bits from `least` on, below `most`.
template <class T>
struct Window {
    int top;
    uint32 least, most;

    DEVICE Window() { put(16); }  // all finite float16
    DEVICE void put(int exponent) {
        const int first = exponent - Span<T>::EXPONENTS + 127, end = exponent + 127;
        top = exponent;
        least = first < 2 ? 1 : (uint32)first << 23;  // the grid holds subnormal numbers too
        most = end >= 255 ? INFINITE : end < 0 ? 0 : (uint32)end << 23;
    }
    DEVICE double bottom() const { return least == 1 ? 0 : power_of_two(top - Span<T>::EXPONENTS); }
    DEVICE double end() const { return top < -125 ? 0 : power_of_two(top); }  // the window before had subnormal numbers
    DEVICE bool holds(const Range& range) const { return range.high < most && range.low >= least - 1; }
    // Moves, if need be, to where it holds the range, and a little more above; false where it cannot.
    DEVICE bool move(const Range& range) {
        if (holds(range)) return true;
        for (int room = HEADROOM; room >= 0; --room) {
            put(range.top() + room);
            if (holds(range)) return true;
        }
        return false;
    }
};

// Adds steps of 2^(place) units to the limbs of a sum, `apart` places from one to the next.
DEVICE void add_steps(uint64* limbs, int apart, int size, int64 steps, int place) {
    if (place < 0) {  // the last bits are 0: the smallest values are multiples of the unit
        steps >>= place < -63 ? 63 : -place;
        place = 0;
    }
    const int k = place / 32, shift = place % 32;
    const uint64 low = (uint64)(uint32)steps << shift;
    const int64 high = (steps >> 32) * ((int64)1 << shift);
    const bool last = k + 2 >= size;
    atomicAdd(limbs + k * apart, (uint64)(uint32)low);
    atomicAdd(limbs + (k + 1) * apart, (low >> 32) + (last ? (uint64)high : (uint64)(uint32)high));
    if (!last) atomicAdd(limbs + (k + 2) * apart, (uint64)(high >> 32));
}

// ---- The sums of a thread -------------------------------------------------------------------------------------------

// Items under way: those of a batch, 0 where there is none.
template <class T, int WIDTH, int INPUTS>
struct Batch {
    enum { ITEMS = Item<T, WIDTH>::UNROLL / (INPUTS == 2 && WIDTH == 8 ? 2 : 1) };
    Item<T, WIDTH> of_x[ITEMS] = {}, of_u[INPUTS == 2 ? ITEMS : 1] = {};
    uint32 there = 0;  // a bit for each item

    DEVICE float x(int k, int j) const { return of_x[k][j]; }
    DEVICE float u(int k, int j) const { return INPUTS == 2 ? of_u[k][j] : of_x[k][j]; }  // squares: u is x
};

// Steps of Su and Su*x: of one channel, or of WIDTH channels side by side (LINES).
template <class T, int WIDTH, int INPUTS, bool LINES>
struct Steps {
    typedef ::Batch<T, WIDTH, INPUTS> Batch;
    enum { SUMS = LINES ? WIDTH : 1, ADDED = Batch::ITEMS * WIDTH / SUMS, SPAN = Span<T>::EXPONENTS };
    uint64 high[SUMS], low[SUMS], value[SUMS];
    Window<T> of_u, of_x;
    uint64* limbs;  // of this thread's first channel
    int slots, columns, count, limit;
    const double* mean;  // of this thread's first channel
    bool spoiled;        // a mean is not finite, so that all is to be counted

    DEVICE Steps(uint64* room, int slots, int columns, int column)
        : limbs(room + column), slots(slots), columns(columns) {
        limit = columns < WARP ? MOST_STEPS / WARP * columns : MOST_STEPS;
        spoiled = false;
        clear();
    }
    DEVICE void know(const double* given) {
        mean = given;
        for (int j = 0; j < SUMS; ++j) spoiled = spoiled || !is_finite(mean[j]);
    }
    DEVICE void clear() {
        count = 0;
#pragma unroll
        for (int j = 0; j < SUMS; ++j) high[j] = low[j] = value[j] = 0;
    }
    DEVICE int top() const { return of_u.top + (INPUTS == 2 ? of_x.top : of_u.top); }

    // All threads of the warp must be here.
    DEVICE void take(const Batch& batch) {
        Range u, x;
#pragma unroll
        for (int k = 0; k < Batch::ITEMS; ++k) {
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                u.take(magnitude(batch.u(k, j)));
                if (INPUTS == 2) x.take(magnitude(batch.x(k, j)));
            }
        }
        const bool fits = of_u.holds(u) && (INPUTS == 1 || of_x.holds(x)) && !spoiled;
        if (__any_sync(ALL_LANES, !fits || count + ADDED > limit)) {
            take_slowly(batch, u, x);
        } else {
            add<false>(batch);
        }
    }

    // Adds the values and products that the grids hold (SOME), or all.
    template <bool SOME>
    DEVICE void add(const Batch& batch) {
        const double first = magic(top() - 50), second = magic(top() - 101), third = magic(of_u.top - 50);
        const double bottom = power_of_two(top() - 2 * SPAN), end = power_of_two(top());
#pragma unroll
        for (int k = 0; k < Batch::ITEMS; ++k) {
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const int sum = LINES ? j : 0;
                double v = float_to_double(batch.u(k, j));
                double t = v * (INPUTS == 2 ? float_to_double(batch.x(k, j)) : v);
                if (SOME) {
                    if (!(bottom <= fabs(t) && fabs(t) < end)) t = 0;  // NaN as well
                    if (!(of_u.bottom() <= fabs(v) && fabs(v) < of_u.end())) v = 0;
                }
                const double coarse = t + first;
                high[sum] += double_to_bits(coarse);
                low[sum] += double_to_bits((t - (coarse - first)) + second);
                value[sum] += double_to_bits(v + third);
            }
        }
        count += ADDED;
    }

    DEVICE void take_slowly(const Batch& batch, Range u, Range x) {
        flush();
        u.over_warp();
        if (INPUTS == 2) x.over_warp();
        const Range& other = INPUTS == 2 ? x : u;
        const bool spoils = __any_sync(ALL_LANES, spoiled);
        if (!spoils && of_u.move(u) && (INPUTS == 1 || of_x.move(x))) {
            add<false>(batch);
            return;
        }
        int end_u = u.top(), end_x = other.top();
        while (end_u >= u.bottom() || end_u + end_x > u.least() + other.least()) {
            of_u.put(end_u);
            of_x.put(end_x);
            add<true>(batch);
            flush();
            end_u -= SPAN;
            end_x -= SPAN;
        }
        if (spoils || u.high >= INFINITE || other.high >= INFINITE) count_kinds(batch);
        of_u = of_x = Window<T>();
    }

    // Counts the values u, and the terms u * (x - mean), that are not finite.
    DEVICE void count_kinds(const Batch& batch) {
#pragma unroll
        for (int k = 0; k < Batch::ITEMS; ++k) {
#pragma unroll
            for (int j = 0; j < WIDTH; ++j) {
                const double u = float_to_double(batch.u(k, j)), x = float_to_double(batch.x(k, j));
                if (!(batch.there >> k & 1)) continue;
                count_kind(u, VALUE_KINDS, j);
                if (INPUTS == 1) continue;
                const double centre = mean[LINES ? j : 0];
                const bool finite = is_finite(u) && is_finite(x) && is_finite(centre);
                if (!finite) count_kind(u * (x - centre), PRODUCT_KINDS, j);
            }
        }
    }
    DEVICE void count_kind(double t, int row, int j) {
        if (is_finite(t)) return;
        const int kind = t != t ? 0 : t > 0 ? 1 : 2;
        atomicAdd(limbs + (row + kind) * slots + (LINES ? j * columns : 0), (uint64)1);
    }

    // Adds the steps to the limbs. All threads of the warp must be here.
    DEVICE void flush() {
        if (count == 0) return;
        const bool mine = columns >= WARP || (int)threadIdx.x % WARP < columns;
#pragma unroll
        for (int j = 0; j < SUMS; ++j) {
            uint64* own = limbs + (LINES ? j * columns : 0);
            const uint64 coarse = excess(high[j], top() - 50), fine = excess(low[j], top() - 101);
            const uint64 values = excess(value[j], of_u.top - 50);
            if (!mine) continue;
            add_steps(own + PRODUCTS * slots, slots, PRODUCT_LIMBS, (int64)coarse, top() - 50 - PRODUCT_UNIT);
            add_steps(own + PRODUCTS * slots, slots, PRODUCT_LIMBS, (int64)fine, top() - 101 - PRODUCT_UNIT);
            add_steps(own, slots, VALUE_LIMBS, (int64)values, of_u.top - 50 - VALUE_UNIT);
        }
        clear();
    }
    // The steps of the lanes of this column together: what is more than the bits of the magic number.
    DEVICE uint64 excess(uint64 bits, int exponent) const {
        uint64 steps = bits - (uint64)count * double_to_bits(magic(exponent));  // modulo 2^64
        for (int step = WARP / 2; step >= columns; step /= 2) steps += __shfl_xor_sync(ALL_LANES, steps, step);
        return steps;
    }
};

// ---- The kernels ----------------------------------------------------------------------------------------------------

// Adds a block's part to the record, which is `out`. LINES: a part has rows, otherwise items of one channel.
template <class T, int WIDTH, int INPUTS, bool LINES>
DEVICE void record_of(const Parameters& p) {
    SHARED(uint64, limbs, RECORD_ROWS * (LINES ? TILE : 1));
    typedef typename T::Stored Stored;
    typedef Steps<T, WIDTH, INPUTS, LINES> Steps;
    typedef typename Steps::Batch Batch;
    const Task task = task_of(p, blockIdx.x);
    const int columns = (int)p.columns, slots = columns * Steps::SUMS, column = threadIdx.x % columns;
    const int row = threadIdx.x / columns, rows = blockDim.x / columns;
    const int64 place = LINES ? task.group * columns + column : task.group, channel = place * Steps::SUMS;
    const bool inside = channel < p.channels;
    for (int i = threadIdx.x; i < RECORD_ROWS * slots; i += blockDim.x) limbs[i] = 0;
    __syncthreads();
    Walk<WIDTH> walk(p, place, task.first + row);
    if (LINES) walk.split(p, rows, walk.offset_step, walk.place_step);
    Steps steps(limbs, slots, columns, column);
    if (INPUTS == 2 && inside) steps.know(p.mean + channel);
    for (int i = 0; i < task.count; i += Batch::ITEMS * rows) {
        Batch batch;
#pragma unroll
        for (int k = 0; k < Batch::ITEMS; ++k) {
            if (inside && i + k * rows + row < task.count) {
                batch.of_x[k].load((const Stored*)p.x + walk.offset);
                if (INPUTS == 2) batch.of_u[k].load((const Stored*)p.u + walk.offset);
                batch.there |= 1u << k;
                walk.next();
            }
        }
        steps.take(batch);
    }
    steps.flush();
    __syncthreads();
    for (int i = threadIdx.x; i < RECORD_ROWS * slots; i += blockDim.x) {
        const int slot = i % slots;
        const int64 owner = LINES ? (task.group * columns + slot % columns) * WIDTH + slot / columns : task.group;
        if (limbs[i]) atomicAdd((uint64*)p.out + i / slots * p.channels + owner, limbs[i]);
    }
}

#define RECORD(name, inputs, lines)                                                                                    \
    template <class T, int WIDTH> DEVICE void name(const Parameters& p) { record_of<T, WIDTH, inputs, lines>(p); }

RECORD(squares_planes, 1, false)
RECORD(squares_rows, 1, true)
RECORD(products_planes, 2, false)
RECORD(products_rows, 2, true)

// ---- From a record to statistics: integers of many digits, rounded once ---------------------------------------------
// One thread has one channel.

// An integer >= 0: digits of 32 bits, the lowest first, in a thread's column of shared memory.
struct Digits {
    uint32* room;
    int size;

    DEVICE uint32& operator[](int k) const { return room[k * WARP]; }
    DEVICE uint32 at(int k) const { return 0 <= k && k < size ? room[k * WARP] : 0; }
    DEVICE uint32 shifted(int k, int shift) const {  // the k-th digit of this number times 2^shift
        const int place = k - shift / 32;
        return (uint32)(((uint64)at(place) << 32 | at(place - 1)) << shift % 32 >> 32);
    }
    DEVICE int last(int before) const {  // the place of the first digit that is not 0; -1 where all are 0
        int k = before - 1;
        while (k >= 0 && (*this)[k] == 0) --k;
        return k;
    }
    // Sets the magnitude of a sum of limbs, of either sign; true where the sum is negative.
    template <int COUNT>
    DEVICE bool set_limbs(const int64* limbs, int64 apart) const {
        int64 own[COUNT], carry = 0;
#pragma unroll
        for (int k = 0; k < COUNT; ++k) own[k] = limbs[k * apart];  // all loads are under way at once
#pragma unroll
        for (int k = 0; k < COUNT; ++k) carry = put(k, own[k] + carry);
        for (int k = COUNT; k < size; ++k) carry = put(k, carry);
        return carry < 0 && negate();
    }
    DEVICE int64 put(int k, int64 digit) const {  // returns what is carried to the next digit
        (*this)[k] = (uint32)digit;
        return digit >> 32;
    }
    DEVICE bool negate() const {
        int64 carry = 1;
        for (int k = 0; k < size; ++k) carry = put(k, (int64)(uint32)~(*this)[k] + carry);
        return true;
    }
    DEVICE void set_product(const Digits& a, const Digits& b) const {
        for (int k = 0; k < size; ++k) (*this)[k] = 0;
        const int end_a = a.last(a.size), end_b = b.last(b.size);
        for (int i = 0; i <= end_a; ++i) {
            uint64 carry = 0;
            for (int j = 0; i + j < size && (j <= end_b || carry); ++j) {
                carry += (uint64)a[i] * b.at(j) + (*this)[i + j];
                (*this)[i + j] = (uint32)carry;
                carry >>= 32;
            }
        }
    }
    DEVICE void subtract(const Digits& b) const {  // b is at most this number
        int64 carry = 0;
        for (int k = 0; k < size; ++k) carry = put(k, (int64)(*this)[k] - b.at(k) + carry);
    }
    // This number, and a little more where `rest`, times 2^exponent, rounded to the nearest float64, on a tie to even.
    DEVICE double rounded(int exponent, bool rest) const {
        const int k = last(size);
        if (k < 0) return 0;
        for (int i = 0; i < k - 2; ++i) rest = rest || (*this)[i];
        const int empty = __clz((int)(*this)[k]);  // zero bits before the first one
        const uint32 third = at(k - 2);
        const uint64 top = ((uint64)(*this)[k] << 32 | at(k - 1)) << empty | (uint64)third << empty >> 32;
        rest = rest || (uint32)(third << empty);
        const int place = exponent + 32 * (k - 1) - empty, drop = place + 11 < -1074 ? -1074 - place : 11;
        if (drop > 64) return 0;
        uint64 whole = drop < 64 ? top >> drop : 0;
        const uint64 beyond = drop < 64 ? top << (64 - drop) : top, half = (uint64)1 << 63;
        if (beyond > half || (beyond == half && (rest || whole & 1))) ++whole;
        return scaled((double)whole, place + drop);
    }
    DEVICE static double scaled(double value, int exponent) {  // value * 2^exponent
        if (exponent < -1000) return power_of_two(-200) * (value * power_of_two(exponent + 200));
        return value * (exponent > 1023 ? words_to_double(0, 0x7ff00000u) : power_of_two(exponent));
    }
    // This number divided by n < 2^32, times 2^exponent, rounded once. `q` has room for four digits.
    DEVICE double divided(uint32 n, int exponent, const Digits& q) const {
        const int first = last(size) - 3;  // four digits of a dividend give a quotient of 64 bits or more
        uint64 rest = 0;
        for (int k = 3; k >= 0; --k) {
            const uint64 part = rest << 32 | at(first + k);
            q[k] = (uint32)(part / n);
            rest = part % n;
        }
        bool more = rest != 0;
        for (int k = 0; k < first; ++k) more = more || (*this)[k];
        return q.rounded(exponent + 32 * first, more);
    }
};

// The sum of the values that are not finite, by the counts of their kinds; 0 where there is none.
DEVICE double special_of(const int64* kinds, int64 apart) {
    const bool nan = kinds[0] > 0, high = kinds[apart] > 0, low = kinds[2 * apart] > 0;
    const double infinity = words_to_double(0, 0x7ff00000u);
    return nan || (high && low) ? infinity - infinity : high ? infinity : low ? -infinity : 0;
}

enum {
    SUM_DIGITS = VALUE_LIMBS + 2, PRODUCT_DIGITS = PRODUCT_LIMBS + 2, SQUARE_DIGITS = 2 * SUM_DIGITS,
    TAKEN_DIGITS = SUM_DIGITS + 2, DIFFERENCE_DIGITS = 54,  // for every mean that a float64 can be
};

// (E1, E3) mean and m2 = (n * Sx^2 - (Sx)^2) / n of n < 2^32 values, and rstd where asked for, of the record x.
template <class T, int WIDTH>
DEVICE void moments_of_record(const Parameters& p) {
    SHARED(uint32, room, WARP * (SUM_DIGITS + PRODUCT_DIGITS + 2 * SQUARE_DIGITS + 4));
    const int64 channel = (int64)blockIdx.x * WARP + threadIdx.x, apart = p.channels;
    if (channel >= apart) return;
    const int64* record = (const int64*)p.x + channel;
    const Digits total = {room + threadIdx.x, SUM_DIGITS}, square = {total.room + WARP * SUM_DIGITS, PRODUCT_DIGITS};
    const Digits scaled = {square.room + WARP * PRODUCT_DIGITS, SQUARE_DIGITS};
    const Digits of_total = {scaled.room + WARP * SQUARE_DIGITS, SQUARE_DIGITS};
    const Digits few = {of_total.room + WARP * SQUARE_DIGITS, 4};
    const double special = special_of(record + VALUE_KINDS * apart, apart);
    double mean = special, m2 = special - special;
    if (special == 0) {
        const bool negative = total.set_limbs<VALUE_LIMBS>(record, apart);
        square.set_limbs<PRODUCT_LIMBS>(record + PRODUCTS * apart, apart);
        const Digits n = {few.room, 1};
        n[0] = (uint32)p.n;
        scaled.set_product(square, n);
        of_total.set_product(total, total);
        scaled.subtract(of_total);
        mean = total.divided((uint32)p.n, VALUE_UNIT, few);
        mean = negative ? -mean : mean;
        m2 = scaled.divided((uint32)p.n, PRODUCT_UNIT, few);
    }
    p.mean[channel] = mean;
    p.m2[channel] = m2;
    if (p.rstd) p.rstd[channel] = rstd_of(m2 / (double)p.n, p.eps);
}

// (E5) Su and Su*(x - mean) = Su*x - mean*Su of the record x; dbias and dweight where rstd is given.
template <class T, int WIDTH>
DEVICE void dots_of_record(const Parameters& p) {
    SHARED(uint32, room, WARP * (SUM_DIGITS + PRODUCT_DIGITS + TAKEN_DIGITS + 2 + DIFFERENCE_DIGITS));
    const int64 channel = (int64)blockIdx.x * WARP + threadIdx.x, apart = p.channels;
    if (channel >= apart) return;
    const int64* record = (const int64*)p.x + channel;
    const Digits total = {room + threadIdx.x, SUM_DIGITS}, product = {total.room + WARP * SUM_DIGITS, PRODUCT_DIGITS};
    const Digits taken = {product.room + WARP * PRODUCT_DIGITS, TAKEN_DIGITS};
    const Digits factor = {taken.room + WARP * TAKEN_DIGITS, 2};
    const bool negative = total.set_limbs<VALUE_LIMBS>(record, apart);
    double sum = special_of(record + VALUE_KINDS * apart, apart);
    double dot = special_of(record + PRODUCT_KINDS * apart, apart);
    if (sum == 0) {
        sum = total.rounded(VALUE_UNIT, false);
        sum = negative ? -sum : sum;
    }
    const double mean = p.mean[channel];
    if (dot == 0 && is_finite(mean)) {
        const int64 sign = product.set_limbs<PRODUCT_LIMBS>(record + PRODUCTS * apart, apart) ? -1 : 1;
        const uint64 bits = double_to_bits(mean);
        const int field = (int)(bits >> 52 & 0x7ff), exponent = (field ? field : 1) - 1075;
        factor[0] = (uint32)bits;
        factor[1] = (uint32)(bits >> 32 & 0xfffff) | (field ? 1u << 20 : 0u);
        taken.set_product(total, factor);
        const int64 other = negative != (bool)(bits >> 63) ? 1 : -1;
        // The unit of `taken` is 2^(exponent + VALUE_UNIT): bring both to the smaller unit.
        const int shift = factor[0] || factor[1] ? exponent + VALUE_UNIT - PRODUCT_UNIT : 0;
        const int up = shift > 0 ? shift : 0, down = shift < 0 ? -shift : 0;
        const int places = 2 + (PRODUCT_DIGITS + down / 32 > TAKEN_DIGITS + up / 32 ? PRODUCT_DIGITS + down / 32
                                                                                    : TAKEN_DIGITS + up / 32);
        const Digits difference = {factor.room + WARP * 2, places};
        int64 carry = 0;
        for (int k = 0; k < places; ++k) {
            carry += sign * (int64)product.shifted(k, down) + other * (int64)taken.shifted(k, up);
            carry = difference.put(k, carry);
        }
        const bool below = carry < 0 && difference.negate();
        dot = difference.rounded(PRODUCT_UNIT - down, false);
        dot = below ? -dot : dot;
    }
    const Pair sums = {sum, dot};
    const Pair found = p.rstd ? parameter_gradients(sums, p.rstd[channel]) : sums;
    p.dbias[channel] = found.first;
    p.dweight[channel] = found.second;
}

// ---- Maps: float64 operations, each of which rounds by itself, and one rounding to the type -------------------------

// (E3, E7) a * (x - mean) + c
template <class T>
struct ExactAffine {
    enum { INPUTS = 1 };
    double mean, a, c;

    DEVICE ExactAffine() {}
    DEVICE ExactAffine(const Parameters& p, int64 channel) : mean(p.mean[channel]) {
        if (p.rstd) {
            const Coefficients found = normalize(p, channel, p.rstd[channel]);
            a = found.a;
            c = found.c;
        } else {
            a = p.a[channel];
            c = p.c[channel];
        }
    }
    DEVICE float of(float x, float, bool = true) const { return double_to_float(a * (float_to_double(x) - mean) + c); }
};

// (E6) a * u + (b * (x - mean) + c)
template <class T>
struct ExactAffine2 {
    enum { INPUTS = 2 };
    double mean, a, b, c;

    DEVICE ExactAffine2() {}
    DEVICE ExactAffine2(const Parameters& p, int64 channel) : mean(p.mean[channel]) {
        if (p.rstd) {
            const Coefficients found = input_gradient(p, channel, p.dbias[channel], p.dweight[channel]);
            a = found.a;
            b = found.b;
            c = found.c;
        } else {
            a = p.a[channel];
            b = p.b[channel];
            c = p.c[channel];
        }
    }
    DEVICE float of(float x, float u, bool = true) const {
        return double_to_float(a * float_to_double(u) + (b * (float_to_double(x) - mean) + c));
    }
};

KERNEL(exact_affine_planes, map_of_planes, ExactAffine, map_task, ALL)
KERNEL(exact_affine2_planes, map_of_planes, ExactAffine2, map_task, ALL)

#ifdef ROWS  // the maps over whole rows, where this file follows rows.cu

ROW_MAP(exact_affine, ExactAffine, rows, false, ALL)
ROW_MAP(exact_affine, ExactAffine, ring, true, ALL)
ROW_MAP(exact_affine2, ExactAffine2, rows, false, ALL)
ROW_MAP(exact_affine2, ExactAffine2, ring, true, ALL)

#endif
