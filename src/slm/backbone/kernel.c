/* y_b += sum over k, r of  w_bk * (A_kr . x_b) * B_kr  for every row b, the pairs read where they lie in the bank.
 *
 * x (N, I), y (N, O), down (S, stride, I), up (S, stride, O), stride >= R, in float32 or bfloat16; slots (B, K), weights (B, K) float32,
 * N = B * T: the T tokens of a row are bent alike. Sums are kept in float32 and y is rounded once; a row without
 * weights is not touched.
 */
#include <stdint.h>
#include <string.h>

typedef uint16_t bf16;

static inline float from_bf16(bf16 v) {
    uint32_t bits = (uint32_t)v << 16;
    float f;
    memcpy(&f, &bits, 4);
    return f;
}

static inline bf16 to_bf16(float f) {
    uint32_t bits;
    memcpy(&bits, &f, 4);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return (bf16)((bits >> 16) | 0x40u); /* not a number */
    return (bf16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

static inline float from_f32(float v) { return v; }
static inline float to_f32(float v) { return v; }

enum { MAX_RANK = 512, BLOCK = 2048, STEP = 32 };

/* What is read four ranks later, or of the next slot, is on its way while these ranks are computed. */
#define FETCH(NEXT, AT)                                                                                 \
    __builtin_prefetch((NEXT) + (AT)), __builtin_prefetch((NEXT) + width + (AT)),                       \
        __builtin_prefetch((NEXT) + 2 * width + (AT)), __builtin_prefetch((NEXT) + 3 * width + (AT))

/* s[r] += M_r . x for the R ranks of one slot, over n of its features. */
#define DOWN(NAME, T, FROM)                                                                             \
    static void NAME(const float *x, const T *M, const T *then, float *s, int64_t R, int64_t width,     \
                     int64_t n) {                                                                       \
        int64_t r = 0;                                                                                  \
        for (; r + 4 <= R; r += 4) {                                                                    \
            const T *a = M + r * width, *b = a + width, *c = b + width, *d = c + width;                 \
            const T *next = r + 8 <= R ? d + width : then;                                              \
            float s0 = 0, s1 = 0, s2 = 0, s3 = 0;                                                       \
            int64_t i = 0;                                                                              \
            for (; i + STEP <= n; i += STEP) {                                                          \
                FETCH(next, i);                                                                         \
                for (int64_t j = i; j < i + STEP; j++) {                                                \
                    s0 += x[j] * FROM(a[j]);                                                            \
                    s1 += x[j] * FROM(b[j]);                                                            \
                    s2 += x[j] * FROM(c[j]);                                                            \
                    s3 += x[j] * FROM(d[j]);                                                            \
                }                                                                                       \
            }                                                                                           \
            for (; i < n; i++) {                                                                        \
                s0 += x[i] * FROM(a[i]);                                                                \
                s1 += x[i] * FROM(b[i]);                                                                \
                s2 += x[i] * FROM(c[i]);                                                                \
                s3 += x[i] * FROM(d[i]);                                                                \
            }                                                                                           \
            s[r] += s0, s[r + 1] += s1, s[r + 2] += s2, s[r + 3] += s3;                                 \
        }                                                                                               \
        for (; r < R; r++) {                                                                            \
            float s0 = 0;                                                                               \
            for (int64_t i = 0; i < n; i++) s0 += x[i] * FROM(M[r * width + i]);                        \
            s[r] += s0;                                                                                 \
        }                                                                                               \
    }

/* y += sum over r of h[r] * M_r for the R ranks of one slot, over n of its features. */
#define UP(NAME, T, FROM)                                                                               \
    static void NAME(float *y, const T *M, const T *then, const float *h, int64_t R, int64_t width,     \
                     int64_t n) {                                                                       \
        int64_t r = 0;                                                                                  \
        for (; r + 4 <= R; r += 4) {                                                                    \
            const T *a = M + r * width, *b = a + width, *c = b + width, *d = c + width;                 \
            const T *next = r + 8 <= R ? d + width : then;                                              \
            const float h0 = h[r], h1 = h[r + 1], h2 = h[r + 2], h3 = h[r + 3];                         \
            int64_t o = 0;                                                                              \
            for (; o + STEP <= n; o += STEP) {                                                          \
                FETCH(next, o);                                                                         \
                for (int64_t j = o; j < o + STEP; j++)                                                  \
                    y[j] += h0 * FROM(a[j]) + h1 * FROM(b[j]) + h2 * FROM(c[j]) + h3 * FROM(d[j]);      \
            }                                                                                           \
            for (; o < n; o++)                                                                          \
                y[o] += h0 * FROM(a[o]) + h1 * FROM(b[o]) + h2 * FROM(c[o]) + h3 * FROM(d[o]);          \
        }                                                                                               \
        for (; r < R; r++)                                                                              \
            for (int64_t o = 0; o < n; o++) y[o] += h[r] * FROM(M[r * width + o]);                      \
    }

#define BEND(NAME, T, FROM, TO)                                                                         \
    DOWN(NAME##_down, T, FROM)                                                                          \
    UP(NAME##_up, T, FROM)                                                                              \
    static void NAME##_row(const T *x, T *y, const T *down, const T *up, const int64_t *slots,          \
                           const float *weights, const T *then, int64_t K, int64_t R, int64_t stride,   \
                           int64_t I, int64_t O) {                                                      \
        float wide[BLOCK], h[MAX_RANK] = {0};                                                           \
        int is_bent = 0;                                                                                \
        for (int64_t k = 0; k < K; k++) is_bent |= weights[k] != 0;                                     \
        if (!is_bent) return;                                                                           \
        for (int64_t at = 0; at < I; at += BLOCK) {                                                     \
            const int64_t n = I - at < BLOCK ? I - at : BLOCK;                                          \
            for (int64_t i = 0; i < n; i++) wide[i] = FROM(x[at + i]);                                  \
            for (int64_t k = 0; k < K; k++) {                                                           \
                const T *next = k + 1 < K ? down + slots[k + 1] * stride * I + at : up + slots[0] * stride * O;   \
                if (weights[k] != 0)                                                                    \
                    NAME##_down(wide, down + slots[k] * stride * I + at, next, h + k * R, R, I, n);          \
            }                                                                                           \
        }                                                                                               \
        for (int64_t k = 0; k < K; k++)                                                                 \
            for (int64_t r = 0; r < R; r++) h[k * R + r] *= weights[k];                                 \
        for (int64_t at = 0; at < O; at += BLOCK) {                                                     \
            const int64_t n = O - at < BLOCK ? O - at : BLOCK;                                          \
            for (int64_t o = 0; o < n; o++) wide[o] = FROM(y[at + o]);                                  \
            for (int64_t k = 0; k < K; k++) {                                                           \
                const T *next = k + 1 < K ? up + slots[k + 1] * stride * O + at : then;                      \
                if (weights[k] != 0)                                                                    \
                    NAME##_up(wide, up + slots[k] * stride * O + at, next, h + k * R, R, O, n);              \
            }                                                                                           \
            for (int64_t o = 0; o < n; o++) y[at + o] = TO(wide[o]);                                    \
        }                                                                                               \
    }                                                                                                   \
                                                                                                        \
    void NAME(const T *x, T *y, const T *down, const T *up, const int64_t *slots, const float *weights, \
              int64_t num_rows, int64_t num_tokens, int64_t K, int64_t R, int64_t stride, int64_t I,    \
              int64_t O, int num_threads) {                                                             \
        _Pragma("omp parallel for num_threads(num_threads) if (num_threads > 1)")                       \
        for (int64_t at = 0; at < num_rows * num_tokens; at++) {                                        \
            const int64_t b = at / num_tokens * K;                                                      \
            const int64_t other = at + 1 < num_rows * num_tokens ? (at + 1) / num_tokens * K : b;       \
            const T *then = down + slots[other] * stride * I;                                                \
            NAME##_row(x + at * I, y + at * O, down, up, slots + b, weights + b, then, K, R, stride, I, \
                       O);                                                                              \
        }                                                                                               \
    }

BEND(bend_bf16, bf16, from_bf16, to_bf16)
BEND(bend_f32, float, from_f32, to_f32)
