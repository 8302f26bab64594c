// What is done to a value and to a channel: the formulas of reference.py, the maps and the sums.
//
// Names and labels are those of reference.py. Data is (N, C, S); what belongs to a channel is float64 and (C,).

// ---- The formulas of reference.py for one channel -------------------------------------------------------------------

// Sums about a shift become sums about another, delta lower: n values d are d + delta.
DEVICE void recentre(double n, double delta, double& s, double& q) {
    const double moved = fma(n, delta, s);
    q = fma(delta, s + moved, q);
    s = moved;
}

// (E1) mean and m2 from the sums of d = x - shift and of its squares.
DEVICE Pair moments_of(double n, double shift, double s, double q) {
    const double d = s / n;
    const bool overflow = !is_finite(q) && q > 0 && is_finite(d);  // the squares alone: m2 is inf, as in NumPy
    const double m2 = overflow ? q : q - s * d;
    Pair moments = {shift + d, m2 < 0 ? 0 : m2};
    return moments;
}

// (E3)
DEVICE double rstd_of(double var, double eps) {
    const double total = var + eps;
    return total == 0 ? 0 : 1 / sqrt(total);
}

// 1 where there is no weight
DEVICE double weight_of(const Parameters& p, int64 channel) {
    return p.weight ? value_of(p.weight, p.parameter_kind, channel) : 1;
}

struct Coefficients {  // of a map
    double a, b, c;
};

// (E3) a and c of y = weight * xhat + bias = a * (x - mean) + c
DEVICE Coefficients normalize(const Parameters& p, int64 channel, double rstd) {
    const Coefficients found = {
        weight_of(p, channel) * rstd, 0, p.bias ? value_of(p.bias, p.parameter_kind, channel) : 0};
    return found;
}

// (E5) dbias and dweight from the sums of dy and of dy * (x - mean)
DEVICE Pair parameter_gradients(Pair sums, double rstd) {
    const Pair gradients = {sums.first, rstd * sums.second};
    return gradients;
}

// (E6) a, b and c of dx = weight * rstd * (dy - dbias/n - xhat * dweight/n) = a * dy + b * (x - mean) + c
DEVICE Coefficients input_gradient(const Parameters& p, int64 channel, double dbias, double dweight) {
    const double rstd = p.rstd[channel], n = (double)p.n, a = weight_of(p, channel) * rstd;
    const Coefficients found = {a, -a * rstd * (dweight / n), -a * (dbias / n)};
    return found;
}

// (E4)
DEVICE double update_running(double running, double value, double momentum) {
    return (1 - momentum) * running + momentum * value;
}

DEVICE void set_running(const Parameters& p, const void* running, void* out, int64 channel, double value) {
    const double average = update_running(value_of(running, p.state_kind, channel), value, p.momentum);
    if (p.state_kind == 0) {
        ((double*)out)[channel] = average;
    } else {
        ((float*)out)[channel] = (float)average;
    }
}

// Adds a gradient, rounded first, to the one that is there.
DEVICE void add_gradient(const Parameters& p, const void* before, void* out, int64 channel, double gradient) {
    if (!out) return;
    if (p.state_kind == 0) {
        ((double*)out)[channel] = before ? ((const double*)before)[channel] + gradient : gradient;
    } else {
        const float rounded = (float)gradient;
        ((float*)out)[channel] = before ? ((const float*)before)[channel] + rounded : rounded;
    }
}

// ---- The values that count ------------------------------------------------------------------------------------------
// `counts` is false for a value that the mask leaves out. The value may be NaN, so it is never multiplied by 0: another
// one is selected in its place.

enum Choice {
    ALL,      // no mask
    MASKED,   // the positions of p.where
    NONZERO,  // sums over all positions, in which x counts for nothing where u is 0
};

// ---- What a map does to a value -------------------------------------------------------------------------------------

// x - mean, where a mean rounded to float32 would move all values of a channel alike: it has a second part.
template <class Value> struct Centre;
template <> struct Centre<float> {
    float high, low;
    DEVICE Centre() {}
    DEVICE explicit Centre(double mean) {
        high = (float)mean;
        low = is_finite(high) ? (float)(mean - (double)high) : 0.0f;
    }
    DEVICE float from(float x) const { return (x - high) - low; }
};
template <> struct Centre<double> {
    double mean;
    DEVICE Centre() {}
    DEVICE explicit Centre(double given) : mean(given) {}
    DEVICE double from(double x) const { return x - mean; }
};

// (E3, E7) a * (x - mean) + c
template <class T>
struct Affine {
    typedef typename T::Value Value;
    enum { INPUTS = 1 };
    Centre<Value> centre;
    Value a, c;

    DEVICE Affine() {}
    DEVICE Affine(double mean, const Coefficients& given) : centre(mean), a((Value)given.a), c((Value)given.c) {}
    DEVICE Affine(const Parameters& p, int64 channel) {
        if (p.rstd) {
            *this = Affine(p.mean[channel], normalize(p, channel, p.rstd[channel]));
        } else {
            const Coefficients plain = {p.a[channel], 0, p.c[channel]};
            *this = Affine(p.mean[channel], plain);
        }
    }
    // The map of the channel with these moments, mean and m2.
    DEVICE Affine(const Parameters& p, int64 channel, Pair moments)
        : Affine(moments.first, normalize(p, channel, rstd_of(moments.second / (double)p.n, p.eps))) {}
    DEVICE Value of(Value x, Value, bool = true) const { return fused(a, centre.from(x), c); }
};

// (E3, E7) The same with fixed statistics, in p.first and p.second.
template <class T>
struct AffineFixed : Affine<T> {
    DEVICE AffineFixed() {}
    DEVICE AffineFixed(const Parameters& p, int64 channel)
        : Affine<T>(value_of(p.first, p.state_kind, channel), normalize(p, channel, rstd(p, channel))) {}
    DEVICE static double rstd(const Parameters& p, int64 channel) {
        return rstd_of(value_of(p.second, p.state_kind, channel), p.eps);
    }
    // Keeps the statistics and the weight of all channels in float64, for a backward.
    DEVICE static void keep(const Parameters& p) {
        const int64 thread = (int64)blockIdx.x * blockDim.x + threadIdx.x, threads = (int64)gridDim.x * blockDim.x;
        for (int64 channel = thread; channel < p.channels; channel += threads) {
            p.mean[channel] = value_of(p.first, p.state_kind, channel);
            p.rstd[channel] = rstd(p, channel);
            p.kept_weight[channel] = weight_of(p, channel);
        }
    }
};

// A power of two near the root of |b|; 1 where that has none.
DEVICE double half_way(double b) {
    const int exponent = (int)(double_to_bits(b) >> 52 & 0x7ff);
    if (exponent == 0 || exponent == 0x7ff) return 1;
    const uint64 half = (uint64)(1023 + (exponent - 1023) / 2) << 52;
    return words_to_double((uint32)half, (uint32)(half >> 32));
}

// (E6) a * u + b * (x - mean) + c, or a * u. b goes as rstd squared, which leaves the range of float32 when rstd does
// not; so it is two factors, one of them a power of two, which rounds nothing.
template <class T>
struct Affine2 {
    typedef typename T::Value Value;
    enum { INPUTS = 2 };
    Centre<Value> centre;
    Value a, b, scale, c;

    DEVICE Affine2() {}
    DEVICE Affine2(double mean, const Coefficients& given) : centre(mean), a((Value)given.a), c((Value)given.c) {
        const double power = half_way(given.b);
        b = (Value)(given.b / power);
        scale = (Value)power;
    }
    DEVICE Affine2(const Parameters& p, int64 channel) {
        if (p.rstd) {
            *this = Affine2(p.mean[channel], input_gradient(p, channel, p.dbias[channel], p.dweight[channel]));
        } else {
            const Coefficients plain = {p.a[channel], p.b[channel], p.c[channel]};
            *this = Affine2(p.mean[channel], plain);
        }
    }
    // The map of the channel with these sums of dy and of dy * (x - mean).
    DEVICE Affine2(const Parameters& p, int64 channel, Pair sums) {
        const Pair gradients = parameter_gradients(sums, p.rstd[channel]);
        *this = Affine2(p.mean[channel], input_gradient(p, channel, gradients.first, gradients.second));
    }
    DEVICE Value of(Value x, Value u, bool counts = true) const {
        const Value rest = fused(b, scale * centre.from(x), c);
        return fused(a, u, counts ? rest : 0);
    }
};

// (E9) a * v + b * u + c * (x - mean) + d, or b * u. a and b go as rstd squared and c as its third power, so each is
// two factors, as b of Affine2.
template <class T>
struct Affine3 {
    typedef typename T::Value Value;
    enum { INPUTS = 3 };
    Centre<Value> centre;
    Value a, b, c, of_v, of_u, of_x, d;

    DEVICE Affine3() {}
    DEVICE Affine3(const Parameters& p, int64 channel) : centre(p.mean[channel]) {
        split(p.a[channel], of_v, a);
        split(p.b[channel], of_u, b);
        split(p.c[channel], of_x, c);
        d = (Value)p.d[channel];
    }
    DEVICE static void split(double coefficient, Value& power, Value& rest) {
        const double half = half_way(coefficient);
        power = (Value)half;
        rest = (Value)(coefficient / half);
    }
    DEVICE Value of(Value x, Value u, Value v, bool counts) const {
        const Value rest = fused(c, of_x * centre.from(x), d);
        const Value without = fused(b, of_u * u, counts ? rest : 0);
        return counts ? fused(a, of_v * v, without) : without;
    }
};

// ---- What is summed -------------------------------------------------------------------------------------------------

// (E1) Sums of d = x - shift and of its squares. Each thread has a shift of its own, the first value it meets, so that
// an outlier among the first values costs the few values of its thread some digits, and no others.
template <class T>
struct MomentSums {
    typedef typename T::Summed Summed;
    enum { INPUTS = 1 };
    Summed shift, few_s, few_q;
    double s, q;

    // `first` is some value of the channel; p.shift, where given, replaces it.
    DEVICE static double shift_of(const Parameters& p, int64 channel, double first) {
        const double shift = p.shift ? p.shift[channel] : first;
        return is_finite(shift) ? shift : 0;
    }
    DEVICE MomentSums() : shift(0), few_s(0), few_q(0), s(0), q(0) {}
    DEVICE void start(const Parameters& p, int64 channel, double first) { shift = (Summed)shift_of(p, channel, first); }
    DEVICE void add(Summed x, Summed, bool counts = true) {
        const Summed d = counts ? x - shift : 0;
        few_s += d;
        few_q = fused(d, d, few_q);
    }
    DEVICE void add_few() {
        s += (double)few_s;
        q += (double)few_q;
        few_s = few_q = 0;
    }
    // A value near this thread's n values, which serves the block as a shift: the first value may be an outlier.
    DEVICE double nearby(const Parameters& p, double n) const {
        if (p.shift) return (double)shift;
        const double mean = (double)shift + s / n;
        return is_finite(mean) ? mean : (double)shift;
    }
    // The sums of this thread's n values about the shift of the block.
    DEVICE void about(double block_shift, double n) { recentre(n, n > 0 ? (double)shift - block_shift : 0, s, q); }

    // mean and m2 of a part
    DEVICE static Pair part(double n, double shift, double s, double q) { return moments_of(n, shift, s, q); }
    // (E2) for many parts at once: sums about the first one's mean, or about the shift where one is given
    DEVICE static double origin(const Parameters& p, int64 channel, Pair first) {
        return shift_of(p, channel, first.first);
    }
    DEVICE static void pool(double n, double origin, Pair part, double& s, double& q) {
        const double delta = part.first - origin;
        s += n * delta;
        q += part.second + n * delta * delta;
    }
    DEVICE static Pair pooled(double n, double origin, double s, double q) { return moments_of(n, origin, s, q); }
    // (E3, E4)
    DEVICE static void finish(const Parameters& p, int64 channel, Pair moments) {
        p.mean[channel] = moments.first;
        p.m2[channel] = moments.second;
        if (p.rstd) p.rstd[channel] = rstd_of(moments.second / (double)p.n, p.eps);
        if (p.kept_weight) p.kept_weight[channel] = weight_of(p, channel);
        if (p.new_first) {
            set_running(p, p.first, p.new_first, channel, moments.first);
            set_running(p, p.second, p.new_second, channel, moments.second / (double)(p.n - 1));
        }
    }
};

// (E5) Sums of u and of u * (x - mean).
template <class T>
struct DotSums {
    typedef typename T::Summed Summed;
    enum { INPUTS = 2 };
    Centre<Summed> centre;
    Summed few_s, few_q;
    double s, q;

    DEVICE static double shift_of(const Parameters&, int64, double) { return 0; }
    DEVICE DotSums() : centre(0), few_s(0), few_q(0), s(0), q(0) {}
    DEVICE void start(const Parameters& p, int64 channel, double) { centre = Centre<Summed>(p.mean[channel]); }
    DEVICE void add(Summed x, Summed given, bool counts = true) {
        const Summed u = counts ? given : 0, d = counts ? centre.from(x) : 0;
        few_s += u;
        few_q = fused(u, d, few_q);
    }
    DEVICE void add_few() {
        s += (double)few_s;
        q += (double)few_q;
        few_s = few_q = 0;
    }
    DEVICE static double nearby(const Parameters&, double) { return 0; }
    DEVICE void about(double, double) {}

    DEVICE static Pair part(double, double, double s, double q) {
        Pair sums = {s, q};
        return sums;
    }
    DEVICE static double origin(const Parameters&, int64, Pair) { return 0; }
    DEVICE static void pool(double, double, Pair part, double& s, double& q) {
        s += part.first;
        q += part.second;
    }
    DEVICE static Pair pooled(double, double, double s, double q) { return part(0, 0, s, q); }
    DEVICE static void finish(const Parameters& p, int64 channel, Pair sums) {
        if (p.rstd) sums = parameter_gradients(sums, p.rstd[channel]);
        p.dweight[channel] = sums.second;
        p.dbias[channel] = sums.first;
        add_gradient(p, p.first, p.new_first, channel, sums.second);
        add_gradient(p, p.second, p.new_second, channel, sums.first);
    }
};
