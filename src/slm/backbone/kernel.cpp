// y_b += sum over k, r of  w_bk * (A_kr . x_b) * B_kr  for every row b, the pairs read where they lie in the bank.
//
// x (B * T, I) and y (B * T, O) in float32 or bfloat16; down (S, stride, I) and up (S, stride, O) in the same, or in
// float16 beside float32, stride >= R; slots (B, K), weights (B, K) float32; order (B), the rows so that those with
// the same slots follow each other: up to MANY of their tokens share what is read. Sums are kept in float32, in
// the same order in whatever company, and y is rounded once; a row without weights is not touched.
#include <cstdint>
#include <cstring>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

constexpr int64_t MAX_RANK = 512;  // K * R
constexpr int64_t BLOCK = 1024;    // features that are kept in float32 at a time
#ifdef __AVX512F__
constexpr int LANES = 16;          // features of one vector
constexpr int MANY = 4;            // tokens with the same slots that are bent together
constexpr int RANKS_OF_TWO = 8;    // ranks at a time, of two tokens
#else
constexpr int LANES = 8;           // and half as many registers, which four ranks of two tokens fill
constexpr int MANY = 2;
constexpr int RANKS_OF_TWO = 4;
#endif
constexpr int PAIR = 2 * LANES;    // features that are loaded at a time

struct bfloat16 {
    uint16_t bits;
};

inline float widen(float value) { return value; }

inline float widen(bfloat16 value) {
    const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
    float wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

#ifdef __F16C__
struct float16 {
    uint16_t bits;
};

inline float widen(float16 value) { return _cvtsh_ss(value.bits); }
#endif

inline void narrow(float value, float &out) { out = value; }

inline void narrow(float value, bfloat16 &out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_number = (bits & 0x7fffffffu) <= 0x7f800000u;
    out.bits = is_number ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u;
}

typedef float Vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));

inline Vector load(const float *values) {
    Vector wide;
    std::memcpy(&wide, values, sizeof wide);
    return wide;
}

inline void store(const Vector &wide, float *values) { std::memcpy(values, &wide, sizeof wide); }

// PAIR features as two vectors: of float32 and float16 the first half and the second, of bfloat16 those at even places
// and those at odd ones, which are the low and the high halves of the same words.
struct Pair {
    Vector one, two;
};

inline Pair load_pair(const float *values) { return {load(values), load(values + LANES)}; }

inline Pair load_pair(const bfloat16 *values) {
    Bits words, low, high;
    std::memcpy(&words, values, sizeof words);
    low = words << 16;
    high = words & 0xffff0000u;
    Pair pair;
    std::memcpy(&pair.one, &low, sizeof low);
    std::memcpy(&pair.two, &high, sizeof high);
    return pair;
}

#ifdef __F16C__
inline Vector load(const float16 *values) {
#ifdef __AVX512F__
    return reinterpret_cast<Vector>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i *>(values))));
#else
    return reinterpret_cast<Vector>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i *>(values))));
#endif
}

inline Pair load_pair(const float16 *values) { return {load(values), load(values + LANES)}; }
#endif

inline void store_pair(const Pair &pair, float *values) {
    store(pair.one, values);
    store(pair.two, values + LANES);
}

// Rounded to the nearest, ties to even, in the upper half of each lane; NaN stays NaN.
inline Bits rounded(const Vector &wide) {
    Bits bits;
    std::memcpy(&bits, &wide, sizeof bits);
    const Bits near = bits + 0x7fffu + ((bits >> 16) & 1u);
    const Bits quiet = bits | 0x400000u;
    return (bits & 0x7fffffffu) <= 0x7f800000u ? near : quiet;
}

inline void store_pair(const Pair &pair, bfloat16 *values) {
    const Bits words = (rounded(pair.one) >> 16) | (rounded(pair.two) & 0xffff0000u);
    std::memcpy(values, &words, sizeof words);
}

// Features in float32, pair by pair as they were loaded; what is left over keeps its order.
template <typename T> inline void widen_all(const T *values, float *wide, int64_t n) {
    int64_t i = 0;
    for (; i + PAIR <= n; i += PAIR) store_pair(load_pair(values + i), wide + i);
    for (; i < n; i++) wide[i] = widen(values[i]);
}

inline void narrowed(const float *wide, bfloat16 *values, int64_t n) {
    int64_t i = 0;
    for (; i + PAIR <= n; i += PAIR) store_pair(load_pair(wide + i), values + i);
    for (; i < n; i++) narrow(wide[i], values[i]);
}

inline void narrowed(const float *, float *, int64_t) {}  // they lie there

// a * b + c, rounded once where the vectors are too: left to the compiler it would depend on the loop around it.
inline float multiply_add(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA)
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

// The sum of all lanes, half by half.
inline float total(const Vector &sums) {
    typedef float Four __attribute__((vector_size(16)));
    Four fours[LANES / 4];
    std::memcpy(fours, &sums, sizeof fours);
    for (int half = LANES / 8; half > 0; half /= 2)
        for (int i = 0; i < half; i++) fours[i] += fours[i + half];
    return (fours[0][0] + fours[0][2]) + (fours[0][1] + fours[0][3]);
}

// Where one slot's half lies, of which some features are looked at: rank r begins at data + r * width.
template <typename P> struct Half {
    const P *data;
    int64_t width;
};

// V tokens in float32, where they lie or as widen_all lays them, each with the products of all its slots and ranks.
template <int V> struct Tokens {
    float *wide[V];
    float half[V][MAX_RANK];
};

// What some features of a token are computed in: a buffer, and for float32 the token itself.
inline float *widened(const bfloat16 *values, float *buffer, int64_t n) {
    widen_all(values, buffer, n);
    return buffer;
}

inline float *widened(const float *values, float *, int64_t) { return const_cast<float *>(values); }

// Ask for the PAIR features at a place.
inline void prefetch(const float *values) {
    __builtin_prefetch(values);
    __builtin_prefetch(values + LANES);
}

inline void prefetch(const bfloat16 *values) { __builtin_prefetch(values); }

#ifdef __F16C__
inline void prefetch(const float16 *values) { __builtin_prefetch(values, 0, 2); }  // into the second cache: measured
#endif

// half[v][at + q] += A_q . x_v for Q ranks; what is read next is on its way meanwhile.
template <int V, int Q, typename P>
inline void down_ranks(Tokens<V> &tokens, Half<P> A, const P *next, int64_t at, int64_t n) {
    Vector sums[V][Q] = {};
    int64_t i = 0;
    for (; i + PAIR <= n; i += PAIR) {
        Pair x[V];
        for (int v = 0; v < V; v++) x[v] = load_pair(tokens.wide[v] + i);
        for (int q = 0; q < Q; q++) {
            prefetch(next + q * A.width + i);
            const Pair a = load_pair(A.data + q * A.width + i);
            for (int v = 0; v < V; v++) {
                sums[v][q] += x[v].one * a.one;
                sums[v][q] += x[v].two * a.two;
            }
        }
    }
    for (int v = 0; v < V; v++)
        for (int q = 0; q < Q; q++) {
            float sum = total(sums[v][q]);
            for (int64_t j = i; j < n; j++)
                sum = multiply_add(tokens.wide[v][j], widen(A.data[q * A.width + j]), sum);
            tokens.half[v][at + q] += sum;
        }
}

// y_v += half[v][at + q] * B_q for Q ranks.
template <int V, int Q, typename P>
inline void up_ranks(Tokens<V> &tokens, Half<P> B, const P *next, int64_t at, int64_t n) {
    float half[V][Q];
    for (int v = 0; v < V; v++)
        for (int q = 0; q < Q; q++) half[v][q] = tokens.half[v][at + q];
    int64_t o = 0;
    for (; o + PAIR <= n; o += PAIR) {
        Vector one[V], two[V];  // not Pair[V], which compilers keep in memory
        for (int v = 0; v < V; v++) {
            const Pair y = load_pair(tokens.wide[v] + o);
            one[v] = y.one;
            two[v] = y.two;
        }
        for (int q = 0; q < Q; q++) {
            prefetch(next + q * B.width + o);
            const Pair b = load_pair(B.data + q * B.width + o);
            for (int v = 0; v < V; v++) {
                one[v] += half[v][q] * b.one;
                two[v] += half[v][q] * b.two;
            }
        }
        for (int v = 0; v < V; v++) store_pair({one[v], two[v]}, tokens.wide[v] + o);
    }
    for (; o < n; o++)
        for (int v = 0; v < V; v++)
            for (int q = 0; q < Q; q++)
                tokens.wide[v][o] = multiply_add(half[v][q], widen(B.data[q * B.width + o]), tokens.wide[v][o]);
}

// As Python lays it out, every part in 64 bits.
template <typename P> struct Call {
    const P *down, *up;
    const int64_t *slots;  // of each row
    const float *weights;
    const int64_t *order;
    int64_t num_rows, num_tokens, num_slots, rank, stride, num_in, num_out, num_threads;
};

// All ranks of one slot, Q at a time while there are as many.
#define FOR_RANKS(WORK, HALF, THEN)                                                          \
    for (int64_t r = 0; r < rank;) {                                                         \
        const bool has_many = r + Q <= rank;                                                 \
        const int64_t later = r + (has_many ? Q : 1);                                        \
        const Half<P> now{HALF.data + r * HALF.width, HALF.width};                           \
        const P *next = later + Q <= rank ? HALF.data + later * HALF.width : THEN;           \
        if (has_many)                                                                        \
            WORK<V, Q>(tokens, now, next, k * rank + r, n);                                  \
        else                                                                                 \
            WORK<V, 1>(tokens, now, next, k * rank + r, n);                                  \
        r = later;                                                                           \
    }

template <typename T> struct Token {
    const T *x;
    T *y;
    const float *weights;  // K
};

// V tokens with the same slots, Q ranks at a time; `then` is read next.
template <int V, int Q, typename T, typename P>
void bend_tokens(const Token<T> *own, const int64_t *slots, const Call<P> &call, const P *then) {
    const int64_t rank = call.rank, K = call.num_slots;
    const int64_t down_size = call.stride * call.num_in, up_size = call.stride * call.num_out;
    const auto is_used = [&](int64_t k) {
        bool is_any = false;
        for (int v = 0; v < V; v++) is_any |= own[v].weights[k] != 0;
        return is_any;
    };
    Tokens<V> tokens;
    float buffers[V][BLOCK];
    for (int v = 0; v < V; v++) std::memset(tokens.half[v], 0, K * rank * sizeof(float));
    for (int64_t at = 0; at < call.num_in; at += BLOCK) {
        const int64_t n = call.num_in - at < BLOCK ? call.num_in - at : BLOCK;
        for (int v = 0; v < V; v++) tokens.wide[v] = widened(own[v].x + at, buffers[v], n);
        for (int64_t k = 0; k < K; k++) {
            if (!is_used(k)) continue;
            const Half<P> A{call.down + slots[k] * down_size + at, call.num_in};
            const P *other = k + 1 < K ? call.down + slots[k + 1] * down_size + at : call.up + slots[0] * up_size;
            FOR_RANKS(down_ranks, A, other)
        }
    }
    for (int v = 0; v < V; v++)
        for (int64_t k = 0; k < K; k++)
            for (int64_t r = 0; r < rank; r++) tokens.half[v][k * rank + r] *= own[v].weights[k];
    for (int64_t at = 0; at < call.num_out; at += BLOCK) {
        const int64_t n = call.num_out - at < BLOCK ? call.num_out - at : BLOCK;
        for (int v = 0; v < V; v++) tokens.wide[v] = widened(own[v].y + at, buffers[v], n);
        for (int64_t k = 0; k < K; k++) {
            if (!is_used(k)) continue;
            const Half<P> B{call.up + slots[k] * up_size + at, call.num_out};
            const P *other = k + 1 < K ? call.up + slots[k + 1] * up_size + at : then;
            FOR_RANKS(up_ranks, B, other)
        }
        for (int v = 0; v < V; v++) narrowed(tokens.wide[v], own[v].y + at, n);
    }
}

// Tokens that are bent together: `num` of them from `first` on.
struct Group {
    int64_t first;
    int num;
    const int64_t *slots;
};

template <typename T, typename P> void bend(const T *x, T *y, const Call<P> &call) {
    const int64_t K = call.num_slots;
    std::vector<Token<T>> tokens;
    std::vector<Group> groups;
    tokens.reserve(call.num_rows * call.num_tokens);
    const auto close = [&](int64_t first, const int64_t *slots) {
        for (int64_t at = first, left; (left = tokens.size() - at) > 0; at += groups.back().num)
            groups.push_back({at, left >= MANY ? MANY : left >= 2 ? 2 : 1, slots});
    };
    int64_t first = 0;
    const int64_t *slots = nullptr;  // of the rows from `first` on
    for (int64_t place = 0; place < call.num_rows; place++) {
        const int64_t row = call.order[place];
        const int64_t *own = call.slots + row * K;
        const float *weights = call.weights + row * K;
        bool is_bent = false;
        for (int64_t k = 0; k < K; k++) is_bent |= weights[k] != 0;
        if (!is_bent) continue;
        if (slots == nullptr || std::memcmp(slots, own, K * sizeof *own) != 0) {
            close(first, slots);
            first = tokens.size();
            slots = own;
        }
        for (int64_t at = row * call.num_tokens; at < (row + 1) * call.num_tokens; at++)
            tokens.push_back({x + at * call.num_in, y + at * call.num_out, weights});
    }
    close(first, slots);
    const int64_t num_groups = groups.size();
#pragma omp parallel for schedule(static) num_threads(call.num_threads) if (call.num_threads > 1)
    for (int64_t g = 0; g < num_groups; g++) {
        const Group &group = groups[g];
        const Token<T> *own = tokens.data() + group.first;
        const int64_t *later = groups[g + 1 < num_groups ? g + 1 : g].slots;
        const P *then = call.down + later[0] * call.stride * call.num_in;
        if (group.num > 2)
            bend_tokens<MANY, 4>(own, group.slots, call, then);
        else if (group.num == 2)
            bend_tokens<2, RANKS_OF_TWO>(own, group.slots, call, then);
        else
            bend_tokens<1, 8>(own, group.slots, call, then);
    }
}

}  // namespace

extern "C" {

void bend_bf16(const bfloat16 *x, bfloat16 *y, const Call<bfloat16> *call) { bend(x, y, *call); }

void bend_f32(const float *x, float *y, const Call<float> *call) { bend(x, y, *call); }

#ifdef __F16C__
void bend_f32_f16(const float *x, float *y, const Call<float16> *call) { bend(x, y, *call); }
#endif

}  // extern "C"
