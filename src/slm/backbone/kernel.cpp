// y_b += sum over k, r of  w_bk * (A_kr . x_b) * B_kr  for every row b, the pairs read where they lie in the bank.
//
// x (B * T, I), y (B * T, O), down (S, stride, I), up (S, stride, O) in float32 or bfloat16, stride >= R; slots
// (B, K), weights (B, K) float32. The T tokens of a row are bent alike. Sums are kept in float32 and y is rounded
// once; a row without weights is not touched.
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t MAX_RANK = 512;  // K * R
constexpr int64_t BLOCK = 1024;    // features that are kept in float32 at a time
constexpr int LANES = 16;          // features of one vector

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

inline void narrow(float value, float &out) { out = value; }

inline void narrow(float value, bfloat16 &out) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof bits);
    const bool is_number = (bits & 0x7fffffffu) <= 0x7f800000u;
    out.bits = is_number ? (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16 : (bits >> 16) | 0x40u;
}

typedef float Vector __attribute__((vector_size(4 * LANES)));

inline Vector load(const float *values) {
    Vector wide;
    std::memcpy(&wide, values, sizeof wide);
    return wide;
}

inline Vector load(const bfloat16 *values) {
    typedef uint16_t Narrow __attribute__((vector_size(2 * LANES)));
    typedef uint32_t Bits __attribute__((vector_size(4 * LANES)));
    Narrow narrow;
    std::memcpy(&narrow, values, sizeof narrow);
    const Bits bits = __builtin_convertvector(narrow, Bits) << 16;
    Vector wide;
    std::memcpy(&wide, &bits, sizeof wide);
    return wide;
}

struct Sizes {
    int64_t num_rows, num_tokens, num_slots, rank, stride, num_in, num_out;
};

// Where one slot's half lies, of which some features are looked at: rank r begins at data + r * width.
template <typename T> struct Half {
    const T *data;
    int64_t width;
};

// V tokens in float32, each with the products of all its slots and ranks.
template <int V> struct Tokens {
    float wide[V][BLOCK];
    float half[V][MAX_RANK];
};

// half[v][at + q] += A_q . x_v for Q ranks; what is read next is on its way meanwhile.
template <int V, int Q, typename T>
inline void down_ranks(Tokens<V> &tokens, Half<T> A, const T *next, int64_t at, int64_t n) {
    Vector sums[V][Q] = {};
    int64_t i = 0;
    for (; i + LANES <= n; i += LANES) {
        Vector x[V];
        for (int v = 0; v < V; v++) x[v] = load(tokens.wide[v] + i);
        for (int q = 0; q < Q; q++) {
            __builtin_prefetch(next + q * A.width + i);
            const Vector a = load(A.data + q * A.width + i);
            for (int v = 0; v < V; v++) sums[v][q] += x[v] * a;
        }
    }
    for (int v = 0; v < V; v++)
        for (int q = 0; q < Q; q++) {
            float sum = 0;
            for (int lane = 0; lane < LANES; lane++) sum += sums[v][q][lane];
            for (int64_t j = i; j < n; j++) sum += tokens.wide[v][j] * widen(A.data[q * A.width + j]);
            tokens.half[v][at + q] += sum;
        }
}

// y_v += half[v][at + q] * B_q for Q ranks.
template <int V, int Q, typename T>
inline void up_ranks(Tokens<V> &tokens, Half<T> B, const T *next, int64_t at, int64_t n) {
    float half[V][Q];
    for (int v = 0; v < V; v++)
        for (int q = 0; q < Q; q++) half[v][q] = tokens.half[v][at + q];
    int64_t o = 0;
    for (; o + LANES <= n; o += LANES) {
        Vector y[V];
        for (int v = 0; v < V; v++) y[v] = load(tokens.wide[v] + o);
        for (int q = 0; q < Q; q++) {
            __builtin_prefetch(next + q * B.width + o);
            const Vector b = load(B.data + q * B.width + o);
            for (int v = 0; v < V; v++) y[v] += half[v][q] * b;
        }
        for (int v = 0; v < V; v++) std::memcpy(tokens.wide[v] + o, &y[v], sizeof y[v]);
    }
    for (; o < n; o++)
        for (int v = 0; v < V; v++)
            for (int q = 0; q < Q; q++) tokens.wide[v][o] += half[v][q] * widen(B.data[q * B.width + o]);
}

template <typename T> struct Bank {
    const T *down, *up;
    const int64_t *slots;
    const float *weights;
};

// All ranks of one slot, Q at a time while there are as many.
#define FOR_RANKS(WORK, HALF, THEN)                                                          \
    for (int64_t r = 0; r < rank;) {                                                         \
        const bool has_many = r + Q <= rank;                                                 \
        const int64_t later = r + (has_many ? Q : 1);                                        \
        const Half<T> now{HALF.data + r * HALF.width, HALF.width};                           \
        const T *next = later + Q <= rank ? HALF.data + later * HALF.width : THEN;           \
        if (has_many)                                                                        \
            WORK<V, Q>(tokens, now, next, k * rank + r, n);                                  \
        else                                                                                 \
            WORK<V, 1>(tokens, now, next, k * rank + r, n);                                  \
        r = later;                                                                           \
    }

// V tokens of one row, Q ranks at a time.
template <int V, int Q, typename T>
void bend_tokens(const T *x, T *y, const Bank<T> &own, const Sizes &sizes, const T *then) {
    const int64_t rank = sizes.rank, K = sizes.num_slots;
    const int64_t down_size = sizes.stride * sizes.num_in, up_size = sizes.stride * sizes.num_out;
    Tokens<V> tokens;
    for (int v = 0; v < V; v++) std::memset(tokens.half[v], 0, K * rank * sizeof(float));
    for (int64_t at = 0; at < sizes.num_in; at += BLOCK) {
        const int64_t n = sizes.num_in - at < BLOCK ? sizes.num_in - at : BLOCK;
        for (int v = 0; v < V; v++)
            for (int64_t i = 0; i < n; i++) tokens.wide[v][i] = widen(x[v * sizes.num_in + at + i]);
        for (int64_t k = 0; k < K; k++) {
            if (own.weights[k] == 0) continue;
            const Half<T> A{own.down + own.slots[k] * down_size + at, sizes.num_in};
            const T *other = k + 1 < K ? own.down + own.slots[k + 1] * down_size + at
                                       : own.up + own.slots[0] * up_size;
            FOR_RANKS(down_ranks, A, other)
        }
    }
    for (int v = 0; v < V; v++)
        for (int64_t k = 0; k < K; k++)
            for (int64_t r = 0; r < rank; r++) tokens.half[v][k * rank + r] *= own.weights[k];
    for (int64_t at = 0; at < sizes.num_out; at += BLOCK) {
        const int64_t n = sizes.num_out - at < BLOCK ? sizes.num_out - at : BLOCK;
        for (int v = 0; v < V; v++)
            for (int64_t o = 0; o < n; o++) tokens.wide[v][o] = widen(y[v * sizes.num_out + at + o]);
        for (int64_t k = 0; k < K; k++) {
            if (own.weights[k] == 0) continue;
            const Half<T> B{own.up + own.slots[k] * up_size + at, sizes.num_out};
            const T *other = k + 1 < K ? own.up + own.slots[k + 1] * up_size + at : then;
            FOR_RANKS(up_ranks, B, other)
        }
        for (int v = 0; v < V; v++)
            for (int64_t o = 0; o < n; o++) narrow(tokens.wide[v][o], y[v * sizes.num_out + at + o]);
    }
}

// Some tokens of one row; `then` is where the next row's pairs begin.
template <typename T>
void bend_row(const T *x, T *y, const Bank<T> &own, const Sizes &sizes, int64_t num_tokens, const T *then) {
    bool is_bent = false;
    for (int64_t k = 0; k < sizes.num_slots; k++) is_bent |= own.weights[k] != 0;
    if (!is_bent) return;
    int64_t t = 0;
    for (; t + 4 <= num_tokens; t += 4)
        bend_tokens<4, 4>(x + t * sizes.num_in, y + t * sizes.num_out, own, sizes, then);
    for (; t < num_tokens; t++)
        bend_tokens<1, 8>(x + t * sizes.num_in, y + t * sizes.num_out, own, sizes, then);
}

template <typename T> void bend(const T *x, T *y, const Bank<T> &bank, const Sizes &sizes, int num_threads) {
    // Tokens of one row are read together, but may be shared among threads.
    const int64_t portion = sizes.num_rows > 1 ? sizes.num_tokens : 8;
    const int64_t per_row = (sizes.num_tokens + portion - 1) / portion;
#pragma omp parallel for num_threads(num_threads) if (num_threads > 1)
    for (int64_t piece = 0; piece < sizes.num_rows * per_row; piece++) {
        const int64_t row = piece / per_row, t = piece % per_row * portion;
        const int64_t left = sizes.num_tokens - t, at = row * sizes.num_tokens + t;
        const int64_t after = row + 1 < sizes.num_rows ? row + 1 : row;
        const Bank<T> own{bank.down, bank.up, bank.slots + row * sizes.num_slots,
                          bank.weights + row * sizes.num_slots};
        const T *then = bank.down + bank.slots[after * sizes.num_slots] * sizes.stride * sizes.num_in;
        bend_row(x + at * sizes.num_in, y + at * sizes.num_out, own, sizes, left < portion ? left : portion,
                 then);
    }
}

}  // namespace

extern "C" {

void bend_bf16(const void *x, void *y, const void *down, const void *up, const int64_t *slots,
               const float *weights, const Sizes *sizes, int num_threads) {
    const Bank<bfloat16> bank{static_cast<const bfloat16 *>(down), static_cast<const bfloat16 *>(up), slots,
                              weights};
    bend(static_cast<const bfloat16 *>(x), static_cast<bfloat16 *>(y), bank, *sizes, num_threads);
}

void bend_f32(const void *x, void *y, const void *down, const void *up, const int64_t *slots,
              const float *weights, const Sizes *sizes, int num_threads) {
    const Bank<float> bank{static_cast<const float *>(down), static_cast<const float *>(up), slots, weights};
    bend(static_cast<const float *>(x), static_cast<float *>(y), bank, *sizes, num_threads);
}

}  // extern "C"
