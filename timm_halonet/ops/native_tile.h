// What the forward and the backward of native.cpp share: the problem's geometry, scratch memory, and the tile.
#pragma once

#include "native_products.h"

#ifdef _OPENMP
extern "C" int omp_get_thread_num();
#endif

namespace {

INLINE i64 thread_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// ---- geometry ----------------------------------------------------------------------------------------------------

struct Problem {  // filled by native.py, in this order
    i64 batch, height_q, width_q, heads, dim, height, width, dim_v;
    i64 block, halo, stride, ring, step, scale_rel, threads;
    i64 q_batch, q_row, q_col, q_head;
    i64 k_batch, k_row, k_col, k_head;
    i64 v_batch, v_row, v_col, v_head;
    i64 dq_pixel, dq_head, dk_pixel, dk_head, dv_pixel, dv_head;  // of gradients, whose pixels are evenly spaced
    double scale;

    i64 window() const { return block + 2 * halo; }
    i64 table() const { return 2 * window() - 1; }
    i64 blocks_h() const { return (height + block - 1) / block; }
    i64 blocks_w() const { return (width + block - 1) / block; }
    i64 dim_pad() const { return round_up(dim, LANES); }
    i64 dim_v_pad() const { return round_up(dim_v, LANES); }
};

struct Span {  // one block along one dimension; its window is cut to the keys that exist
    i64 query, queries, key, keys, clip, table, tables;
    Span(const Problem& p, i64 i, i64 length, i64 length_q) {
        i64 per_block = p.block / p.stride, start = i * p.block - p.halo;
        query = i * per_block;
        queries = min(per_block, length_q - query);
        key = max(start, -p.ring);
        keys = min(start + p.window(), length + p.ring) - key;
        clip = key - start;
        tables = keys + (queries - 1) * p.step;  // rows of the table in use, the first being that of the last query
        table = clip + p.window() - 1 - (queries - 1) * p.step;
    }
};

// Hands out memory piece by piece; without memory of its own it only counts.
struct Arena {
    float* base = nullptr;
    i64 used = 0;
    float* take(i64 n) {
        float* p = base ? base + used : nullptr;
        used += round_up(n, 16);
        return p;
    }
};

struct Scratch {
    float* base = nullptr;
    i64 size = 0;
    bool reserve(i64 n) {
        if (n <= size) return true;
        release();
        base = static_cast<float*>(aligned_alloc(64, round_up(n, 1024) * sizeof(float)));
        if (base) size = round_up(n, 1024);
        return base;
    }
    // for as many threads as there is memory for, `each` floats a thread; the results do not depend on their number
    bool reserve(i64 each, i64& threads) {
        while (!reserve(each * threads)) {
            if (threads == 1) return false;
            threads /= 2;
        }
        return true;
    }
    void release() {
        free(base);
        base = nullptr, size = 0;
    }
    ~Scratch() { free(base); }
};

// Of the thread that calls. Kept between calls, because fresh pages cost more than small tiles, up to a limit.
thread_local Scratch scratch;
const i64 KEEP = 1 << 20;  // floats for each thread of a team: 4 MB, which few shapes need

struct Kept {  // while it lives, a call uses `scratch`
    i64 threads;
    ~Kept() {
        if (scratch.size > KEEP * threads) scratch.release();
    }
};

const i64 CHUNK = 5376;  // scores at once: 6 rows of a window of 14 for 64 queries, two thirds of a small L1 cache

// The buffers of one tile, and what forward and backward both do with them.
template <class T>
struct Tile {
    static const bool pairs = PAIRS && std::is_same_v<T, uint16_t>;
    using E = std::conditional_t<pairs, Pair, float>;
    const Problem& p;
    const float* tables;  // scaled: height, then width, rows of dim_pad
    i64 dp, dvp, ld = 0, nq = 0, chunk = 0;
    float *q, *qt, *k, *v, *rh, *rw;
    E *qt_e, *k_e, *v_e;  // what the products with them take
    int32_t *shift_h, *shift_w;  // of each query, in steps: how far its row or column is from the last one's

    static i64 max_lanes(const Problem& p) {
        i64 side = p.block / p.stride;
        return round_up(min(side, p.height_q) * min(side, p.width_q), LANES);
    }
    static i64 max_keys(const Problem& p, i64 length) { return min(p.window(), length + 2 * p.ring); }
    static i64 chunk_rows(i64 keys, i64 lanes) { return max(1, CHUNK / (keys * lanes)); }
    static i64 chunk_size(const Problem& p) { return max(CHUNK, max_keys(p, p.width) * max_lanes(p)); }
    static i64 max_tables(const Problem& p, i64 length, i64 length_q) {
        return max_keys(p, length) + (min(p.block / p.stride, length_q) - 1) * p.step;
    }
    Tile(const Problem& p, const float* tables, Arena& arena)
        : p(p), tables(tables), dp(p.dim_pad()), dvp(p.dim_v_pad()) {
        i64 n = max_lanes(p), keys = max_keys(p, p.height) * max_keys(p, p.width);
        q = arena.take(n * dp), qt = arena.take(n * dp);
        k = arena.take(keys * dp), v = arena.take(keys * dvp);
        rh = arena.take(n * max_tables(p, p.height, p.height_q));
        rw = arena.take(n * max_tables(p, p.width, p.width_q));
        shift_h = reinterpret_cast<int32_t*>(arena.take(n)), shift_w = reinterpret_cast<int32_t*>(arena.take(n));
        qt_e = elements(qt, n * dp, arena), k_e = elements(k, keys * dp, arena), v_e = elements(v, keys * dvp, arena);
    }

    static E* elements(float* x, i64 n, Arena& arena) {  // x itself, or memory for n elements made of it
        if constexpr (pairs) return reinterpret_cast<E*>(arena.take(n));
        else return x;
    }
    static i64 count(i64 n) { return pairs ? (n + 1) / 2 : n; }

    void gather(const T* src, i64 row, i64 col, const Span& a, const Span& b, float* dst, i64 d, i64 padded) {
        for (i64 y = a.key; y < a.key + a.keys; y++)
            for (i64 x = b.key; x < b.key + b.keys; x++, dst += padded) {
                if (y >= 0 && y < p.height && x >= 0 && x < p.width)
                    load(src + y * row + x * col, dst, d, 1);
                else
                    memset(dst, 0, padded * sizeof(float));
            }
    }

    // rows of queries (or anything of their shape), and the same with queries as lanes
    void gather_queries(const T* src, i64 row, i64 col, const Span& a, const Span& b, float* rows, float* lanes, i64 d,
                        i64 padded) {
        for (i64 y = 0; y < a.queries; y++)
            for (i64 x = 0; x < b.queries; x++)
                load(src + (a.query + y) * row + (b.query + x) * col, rows + (y * b.queries + x) * padded, d, 1);
        memset(rows + nq * padded, 0, (ld - nq) * padded * sizeof(float));
        transpose(rows, padded, ld, padded, lanes, ld);
    }

    void start(const T* q_, const T* k_, const T* v_, i64 image, i64 head, const Span& a, const Span& b) {
        nq = a.queries * b.queries;
        ld = round_up(nq, LANES);
        chunk = chunk_rows(b.keys, ld);
        gather_queries(q_ + image * p.q_batch + head * p.q_head, p.q_row, p.q_col, a, b, q, qt, p.dim, dp);
        gather(k_ + image * p.k_batch + head * p.k_head, p.k_row, p.k_col, a, b, k, p.dim, dp);
        gather(v_ + image * p.v_batch + head * p.v_head, p.v_row, p.v_col, a, b, v, p.dim_v, dvp);
        for (i64 j = 0; j < ld; j++) {
            shift_h[j] = j < nq ? a.queries - 1 - j / b.queries : 0;
            shift_w[j] = j < nq ? b.queries - 1 - j % b.queries : 0;
        }
        scores(tables + a.table * dp, dp, a.tables, qt, ld, p.dim, rh, 1, nullptr, nullptr);
        scores(tables + (p.table() + b.table) * dp, dp, b.tables, qt, ld, p.dim, rw, 1, nullptr, nullptr);
        skew(rh, a, shift_h);
        skew(rw, b, shift_w);
        if constexpr (pairs) {
            pair_rows(qt, dp, ld, qt_e);
            pair_columns(k, a.keys * b.keys, dp, k_e);
        }
    }

    // From (table row, query) to (key row or column, query), in place: each lane moves up by its shift, one bit of the
    // shift at a time.
    void skew(float* x, const Span& span, const int32_t* shift) {
        for (i64 j = 0; j < ld; j += LANES) {
            IVec by = *reinterpret_cast<const IVec*>(shift + j);
            for (i64 bit = 1; bit < span.queries; bit *= 2) {
                IVec moves = (by & (int32_t)bit) != 0;
                for (i64 t = 0; t + bit * p.step < span.tables; t++)
                    at(x + t * ld + j) = moves ? at(x + (t + bit * p.step) * ld + j) : at(x + t * ld + j);
            }
        }
    }

    // The way back, for gradients; rows past the keys' must be 0 on entry.
    void unskew(float* x, const Span& span, const int32_t* shift) {
        for (i64 j = 0; j < ld; j += LANES) {
            IVec by = *reinterpret_cast<const IVec*>(shift + j);
            for (i64 bit = 1; bit < span.queries; bit *= 2) {
                IVec moves = (by & (int32_t)bit) != 0;
                for (i64 t = span.tables - 1; t >= 0; t--) {
                    i64 from = t - bit * p.step;
                    Vec above = from < 0 ? Vec{} : at(x + from * ld + j);
                    at(x + t * ld + j) = moves ? above : at(x + t * ld + j);
                }
            }
        }
    }

    void logits(i64 u, i64 rows, i64 keys, float* s) {  // of window rows u to u + rows
        for (i64 i = 0; i < rows; i++)
            scores(k_e + (u + i) * keys * dp, dp, keys, qt_e, ld, count(p.dim), s + i * keys * ld, p.scale,
                   rh + (u + i) * ld, rw);
    }
};

void scaled_tables(const Problem& p, const float* rel_h, const float* rel_w, float* tables) {
    float factor = p.scale_rel ? p.scale : 1;
    for (i64 t = 0; t < 2 * p.table(); t++) {
        const float* row = t < p.table() ? rel_h + t * p.dim : rel_w + (t - p.table()) * p.dim;
        load(row, tables + t * p.dim_pad(), p.dim, factor);
    }
}

}  // namespace
