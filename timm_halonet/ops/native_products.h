// Vectors by the extensions that g++ and clang++ share (AVX-512, AVX, anything of 16 bytes), and the matrix products of
// native.cpp on them.
#pragma once

#include <cfloat>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <type_traits>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if defined(__AVX512F__)
#define LANES 16
#define ROWS 6  // rows of a register tile
#elif defined(__AVX__)
#define LANES 8
#define ROWS 2
#else
#define LANES 4
#define ROWS 4
#endif

#define INLINE static inline __attribute__((always_inline))
#ifdef __clang__
#define UNROLL _Pragma("clang loop unroll(full)")
#else
#define UNROLL _Pragma("GCC unroll 16")
#endif

namespace {

typedef int64_t i64;
typedef float Vec __attribute__((vector_size(LANES * 4), may_alias));
typedef int32_t IVec __attribute__((vector_size(LANES * 4), may_alias));
typedef uint32_t UVec __attribute__((vector_size(LANES * 4), may_alias));
typedef float LooseVec __attribute__((vector_size(LANES * 4), may_alias, aligned(4)));
typedef uint16_t LooseHalf __attribute__((vector_size(LANES * 2), may_alias, aligned(2)));

typedef uint32_t Pair;  // two bfloat16

INLINE Vec splat(float x) { return x - Vec{}; }
INLINE UVec splat(Pair x) { return x - UVec{}; }
INLINE Vec& at(float* p) { return *reinterpret_cast<Vec*>(p); }
INLINE const Vec& at(const float* p) { return *reinterpret_cast<const Vec*>(p); }
INLINE UVec& at(Pair* p) { return *reinterpret_cast<UVec*>(p); }
INLINE const UVec& at(const Pair* p) { return *reinterpret_cast<const UVec*>(p); }
template <class E>
using VecOf = std::conditional_t<std::is_same_v<E, float>, Vec, UVec>;

INLINE Vec madd(Vec sum, Vec x, Vec y) { return sum + x * y; }
#ifdef __AVX512BF16__
const bool PAIRS = true;
INLINE Vec madd(Vec sum, UVec x, UVec y) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)x, (__m512bh)y);
}
#else
const bool PAIRS = false;
INLINE Vec madd(Vec sum, UVec, UVec) { return sum; }  // never called
#endif
INLINE i64 round_up(i64 n, i64 m) { return (n + m - 1) / m * m; }
INLINE i64 min(i64 a, i64 b) { return a < b ? a : b; }
INLINE i64 max(i64 a, i64 b) { return a > b ? a : b; }

// e^x for x <= 88, 0 below the smallest normal number. Relative error 1e-7, where the CPU multiplies and adds in one
// step. NaN stays NaN: the comparison lets it pass, and whatever factor its low bits become, the product is NaN.
INLINE Vec exponential(Vec x) {
    const Vec low = splat(-88.03f), magic = splat(12582912.0f + 127.0f);  // low: 127 times the logarithm of 2
    x = low > x ? low : x;
    Vec t = x * 1.4426950408889634f + magic;  // rounds to an integer n; its low bits are n + 127, the exponent of 2^n
    Vec f = x * 1.4426950408889634f - (t - magic);
    Vec p = splat(1.5345811831e-04f);
    p = p * f + 1.3399931218e-03f;
    p = p * f + 9.6184889578e-03f;
    p = p * f + 5.5503287770e-02f;
    p = p * f + 2.4022646891e-01f;
    p = p * f + 6.9314720574e-01f;
    p = p * f + 1.0f;
    return p * (Vec)((IVec)t << 23);
}

// Vectors by hand: compilers widen 16-bit loops to vectors longer than the 16 channels of a head, and run none.
INLINE Vec widen(const float* x) { return *reinterpret_cast<const LooseVec*>(x); }
INLINE Vec widen(const uint16_t* x) {
    return (Vec)(__builtin_convertvector(*reinterpret_cast<const LooseHalf*>(x), UVec) << 16);
}
INLINE void narrow(Vec x, float* y) { *reinterpret_cast<LooseVec*>(y) = x; }
INLINE void narrow(Vec x, uint16_t* y) {
    UVec bits = (UVec)x, nan = bits * 0 + 0x7fc0;
    UVec rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
    rounded = (bits & 0x7fffffff) > 0x7f800000 ? nan : rounded;
    *reinterpret_cast<LooseHalf*>(y) = __builtin_convertvector(rounded, LooseHalf);
}

// Whether all n floats, whole vectors of them, are finite: everything else times 0 is NaN.
inline bool all_finite(const float* x, i64 n) {
    Vec sum = Vec{};
    for (i64 i = 0; i < n; i += LANES) sum += at(x + i) * 0.0f;
    bool finite = true;
    for (int i = 0; i < LANES; i++) finite &= sum[i] == 0;
    return finite;
}

// dst[0:n] = src[0:n] * factor, then zeros up to a whole vector
template <class T>
INLINE void load(const T* src, float* dst, i64 n, float factor) {
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) at(dst + i) = widen(src + i) * factor;
    if (i < n) {
        T part[LANES] = {};
        for (i64 j = i; j < n; j++) part[j - i] = src[j];
        at(dst + i) = widen(part) * factor;
    }
}

template <class T>
INLINE void store(const float* src, T* dst, i64 n, float factor) {
    i64 i = 0;
    for (; i + LANES <= n; i += LANES) narrow(at(src + i) * factor, dst + i);
    if (i < n) {
        T part[LANES];
        narrow(at(src + i) * factor, part);
        for (i64 j = i; j < n; j++) dst[j] = part[j - i];
    }
}

#ifdef __clang__
#define SHUFFLE(x, y, ...) __builtin_shufflevector(x, y, __VA_ARGS__)
#else  // g++ knows the other one from version 12 on
#define SHUFFLE(x, y, ...) __builtin_shuffle(x, y, IVec{__VA_ARGS__})
#endif

// half a vector of x and of y from lane FIRST on, in turns
template <int FIRST>
INLINE Vec interleave(Vec x, Vec y) {
#define TURN(i) FIRST + (i), LANES + FIRST + (i)
#if LANES == 16
    return SHUFFLE(x, y, TURN(0), TURN(1), TURN(2), TURN(3), TURN(4), TURN(5), TURN(6), TURN(7));
#elif LANES == 8
    return SHUFFLE(x, y, TURN(0), TURN(1), TURN(2), TURN(3));
#else
    return SHUFFLE(x, y, TURN(0), TURN(1));
#endif
}

// t[c][r] = a[r][c]; rows and columns in whole vectors, which pass a network of shuffles
void transpose(const float* a, i64 lda, i64 rows, i64 cols, float* t, i64 ldt) {
    for (i64 r = 0; r < rows; r += LANES)
        for (i64 c = 0; c < cols; c += LANES) {
            Vec x[LANES], y[LANES];
            UNROLL for (int i = 0; i < LANES; i++) x[i] = at(a + (r + i) * lda + c);
            UNROLL for (int stage = 1; stage < LANES; stage *= 2) {
                UNROLL for (int i = 0; i < LANES / 2; i++) {
                    y[2 * i] = interleave<0>(x[i], x[i + LANES / 2]);
                    y[2 * i + 1] = interleave<LANES / 2>(x[i], x[i + LANES / 2]);
                }
                UNROLL for (int i = 0; i < LANES; i++) x[i] = y[i];
            }
            UNROLL for (int i = 0; i < LANES; i++) at(t + (c + i) * ldt + r) = x[i];
        }
}

// two vectors of floats to one of pairs, by the CPU's own rounding, which knows NaN
#ifdef __AVX512BF16__
INLINE UVec pack(Vec x, Vec y) {
    const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6,
                                           21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
    return (UVec)_mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh((__m512)y, (__m512)x));
}
INLINE LooseHalf halves(Vec x) { return (LooseHalf)_mm512_cvtneps_pbh((__m512)x); }
#else
INLINE UVec pack(Vec, Vec) { return UVec{}; }  // never called
INLINE LooseHalf halves(Vec) { return LooseHalf{}; }
#endif

// pairs[i][c] = rows 2i and 2i + 1 of x, whose rows past `rows` count as 0
INLINE void pair_rows(const float* x, i64 rows, i64 ld, Pair* pairs) {
    for (i64 r = 0; r < rows; r += 2)
        for (i64 c = 0; c < ld; c += LANES)
            at(pairs + r / 2 * ld + c) = pack(at(x + r * ld + c), r + 1 < rows ? at(x + (r + 1) * ld + c) : Vec{});
}

// pairs[r][i] = columns 2i and 2i + 1 of row r of x, both with row length ld; may be the same memory
INLINE void pair_columns(const float* x, i64 rows, i64 ld, Pair* pairs) {
    for (i64 r = 0; r < rows; r++)
        for (i64 c = 0; c < ld; c += LANES) {
            uint16_t* to = reinterpret_cast<uint16_t*>(pairs + r * ld) + c;
            *reinterpret_cast<LooseHalf*>(to) = halves(at(x + r * ld + c));
        }
}

// ---- the three products ------------------------------------------------------------------------------------------
// Register tiles of R rows by V vectors; the loops over R and V vanish, the sums live in registers. They start from 0
// and join what is there at the end: sums of sums round less than one long sum.

// E is float, or a pair of neighbours along the dimension that is summed over.

// s[r][q] = a[r] . bt[:, q] (* factor + first[q] + each[r][q])
template <class E, int R, int V>
INLINE void scores_tile(const E* a, i64 lda, const E* bt, i64 ld, i64 d, float* s, float factor, const float* first,
                        const float* each) {
    Vec acc[R][V] = {};
    for (i64 i = 0; i < d; i++) {
        VecOf<E> b[V];
        UNROLL for (int v = 0; v < V; v++) b[v] = at(bt + i * ld + v * LANES);
        UNROLL for (int r = 0; r < R; r++) {
            VecOf<E> x = splat(a[r * lda + i]);
            UNROLL for (int v = 0; v < V; v++) acc[r][v] = madd(acc[r][v], x, b[v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) {
        if (first) acc[r][v] = acc[r][v] * factor + (at(first + v * LANES) + at(each + r * ld + v * LANES));
        at(s + r * ld + v * LANES) = acc[r][v];
    }
}

// ot[c][q] = ot[c][q] (* alpha[q]) + factor * sum_r a[r][c] s[r][q]
template <class E, int C, int V>
INLINE void outputs_tile(const E* a, i64 lda, const E* s, i64 ld, i64 rows, float* ot, const float* alpha,
                         float factor) {
    Vec acc[C][V] = {};
    for (i64 r = 0; r < rows; r++) {
        VecOf<E> b[V];
        UNROLL for (int v = 0; v < V; v++) b[v] = at(s + r * ld + v * LANES);
        UNROLL for (int c = 0; c < C; c++) {
            VecOf<E> x = splat(a[r * lda + c]);
            UNROLL for (int v = 0; v < V; v++) acc[c][v] = madd(acc[c][v], x, b[v]);
        }
    }
    UNROLL for (int c = 0; c < C; c++) UNROLL for (int v = 0; v < V; v++) {
        Vec& o = at(ot + c * ld + v * LANES);
        o = (alpha ? o * at(alpha + v * LANES) : o) + acc[c][v] * factor;
    }
}

// g[r][c] += sum_q s[r][q] b[q][c]
template <class E, int R, int V>
INLINE void gradients_tile(const E* s, i64 ld, i64 queries, const E* b, i64 ldb, float* g) {
    Vec acc[R][V] = {};
    for (i64 q = 0; q < queries; q++) {
        VecOf<E> x[V];
        UNROLL for (int v = 0; v < V; v++) x[v] = at(b + q * ldb + v * LANES);
        UNROLL for (int r = 0; r < R; r++) {
            VecOf<E> y = splat(s[r * ld + q]);
            UNROLL for (int v = 0; v < V; v++) acc[r][v] = madd(acc[r][v], y, x[v]);
        }
    }
    UNROLL for (int r = 0; r < R; r++) UNROLL for (int v = 0; v < V; v++) at(g + r * ldb + v * LANES) += acc[r][v];
}

// Calls F<n, V>(first row) over `rows` rows in register tiles of at most MOST rows, of nearly equal height.
template <int MOST, class F>
INLINE void by_rows(i64 rows, F&& f) {
    i64 tiles = (rows + MOST - 1) / MOST;
    for (i64 r = 0; tiles > 0; tiles--) {
        i64 n = (rows - r + tiles - 1) / tiles;
        switch (n) {
            case 1: f.template operator()<1>(r); break;
            case 2: f.template operator()<2>(r); break;
            case 3: if constexpr (MOST >= 3) f.template operator()<3>(r); break;
            case 4: if constexpr (MOST >= 4) f.template operator()<4>(r); break;
            case 5: if constexpr (MOST >= 5) f.template operator()<5>(r); break;
            case 6: if constexpr (MOST >= 6) f.template operator()<6>(r); break;
            case 7: if constexpr (MOST >= 7) f.template operator()<7>(r); break;
            case 8: if constexpr (MOST >= 8) f.template operator()<8>(r); break;
        }
        r += n;
    }
}

// Calls F<V>(first lane) over `lanes` lanes in groups of 4, 2 and 1 vectors.
template <class F>
INLINE void by_lanes(i64 lanes, F&& f) {
    i64 q = 0;
    for (; q + 4 * LANES <= lanes; q += 4 * LANES) f.template operator()<4>(q);
    if (q + 2 * LANES <= lanes) f.template operator()<2>(q), q += 2 * LANES;
    if (q < lanes) f.template operator()<1>(q);
}

template <class E>
__attribute__((noinline)) void scores(const E* a, i64 lda, i64 rows, const E* bt, i64 ld, i64 d, float* s,
                                      float factor, const float* first, const float* each) {
    by_lanes(ld, [&]<int V>(i64 q) {
        by_rows<V == 4 ? ROWS : 8>(rows, [&]<int R>(i64 r) {
            scores_tile<E, R, V>(a + r * lda, lda, bt + q, ld, d, s + r * ld + q, factor, first ? first + q : nullptr,
                                 first ? each + r * ld + q : nullptr);
        });
    });
}

template <class E>
__attribute__((noinline)) void outputs(const E* a, i64 lda, i64 channels, const E* s, i64 ld, i64 rows, float* ot,
                                       const float* alpha, float factor) {
    by_lanes(ld, [&]<int V>(i64 q) {
        by_rows<V == 4 ? ROWS : 8>(channels, [&]<int C>(i64 c) {
            outputs_tile<E, C, V>(a + c, lda, s + q, ld, rows, ot + c * ld + q, alpha ? alpha + q : nullptr, factor);
        });
    });
}

template <class E>
__attribute__((noinline)) void gradients(const E* s, i64 ld, i64 rows, i64 queries, const E* b, i64 ldb, float* g) {
    by_lanes(ldb, [&]<int V>(i64 c) {
        by_rows<V == 4 ? ROWS : 8>(rows, [&]<int R>(i64 r) {
            gradients_tile<E, R, V>(s + r * ld, ld, queries, b + c, ldb, g + r * ldb + c);
        });
    });
}

}  // namespace
