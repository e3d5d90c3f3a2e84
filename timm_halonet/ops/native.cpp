// Halo attention for CPUs, forward and backward; called through ctypes by native.py, so no PyTorch headers.
//
// One (image, block, head) is a tile. Queries are the vector lanes and keys the rows of every score matrix
// S[key][query] (blocks of 8 x 8 and 4 x 4 queries fill whole vectors, and windows of 14 or 11 keys need no padding),
// so the softmax needs no sums across lanes. Keys go by in chunks of some window rows whose scores stay in the L1
// cache: the forward keeps a running maximum and saves maximum and sum of each query; the backward computes the same
// weights again from both. (From the logsumexp alone they would not add up to 1: for logits of 10^4 its rounding is
// 10^-3.) It goes through a tile's weights twice, first for the mean of their gradients: from the output, which is
// rounded, the gradients of a query's logits would not add up to 0.
//
// Tables of relative positions are used as a few more keys: their products with the queries, skewed by the query's
// position, start the scores, and their gradients come from the same three small matrix products as those of the keys.
//
// Everything is computed in float32, but that for bfloat16 inputs, on CPUs with its dot product, the products take
// bfloat16 pairs: the inputs as they are, the weights and their gradients rounded (their sums are of the unrounded).
// Results do not depend on the number of threads: tiles are independent in the forward, and in the backward one thread
// walks all blocks of an (image, head) in order.
//
// NaN and infinity reach what sees them, and nothing else: an output sees its query, the keys and values of its window
// and the rows of the tables for them, and gradients follow by the chain rule. What does not exist is never multiplied
// by a number that may not be finite: 0 times NaN is NaN.

#include "native_tile.h"

namespace {

// ---- forward ------------------------------------------------------------------------------------------------------

template <class T>
struct Forward : Tile<T> {
    float *s, *ot, *o;          // scores of a chunk; the output by channels, and by queries
    float *top, *sum, *alpha;  // of each query: maximum and sum so far, factor of what was before this chunk
    Forward(const Problem& p, const float* tables, Arena& arena) : Tile<T>(p, tables, arena) {
        i64 lanes = this->max_lanes(p);
        s = arena.take(this->chunk_size(p));
        ot = arena.take(lanes * this->dvp), o = arena.take(lanes * this->dvp);
        top = arena.take(lanes), sum = arena.take(lanes), alpha = arena.take(lanes);
    }
};

// Returns 0, or how many bytes one thread would need that could not be had.
template <class T>
i64 forward(const Problem& p, const T* q, const T* k, const T* v, const float* rel_h, const float* rel_w, T* out,
            float* saved) {
    Arena count;
    Forward<T>(p, nullptr, count);
    i64 each = round_up(count.used, 1024), table_size = 2 * p.table() * p.dim_pad(), threads = p.threads;
    Scratch shared;
    Kept kept{threads};
    if (!shared.reserve(table_size) || !scratch.reserve(each, threads)) return (table_size + each) * sizeof(float);
    float* memory = scratch.base;
    scaled_tables(p, rel_h, rel_w, shared.base);
    i64 blocks_w = p.blocks_w(), tiles = p.batch * p.blocks_h() * blocks_w * p.heads;
#pragma omp parallel num_threads(threads)
    {
        Arena arena{memory + each * thread_number()};
        Forward<T> t(p, shared.base, arena);
        i64 dvp = t.dvp;
        float *ot = t.ot, *top = t.top, *sum = t.sum;
#pragma omp for schedule(dynamic, 4)
        for (i64 i = 0; i < tiles; i++) {  // heads innermost: neighbours share cache lines
            i64 head = i % p.heads, block = i / p.heads % (p.blocks_h() * blocks_w);
            i64 image = i / p.heads / (p.blocks_h() * blocks_w);
            Span a(p, block / blocks_w, p.height, p.height_q), b(p, block % blocks_w, p.width, p.width_q);
            t.start(q, k, v, image, head, a, b);
            i64 ld = t.ld, row_e = t.count(b.keys);  // elements of a window row
            if constexpr (t.pairs)
                for (i64 u = 0; u < a.keys; u++)
                    pair_rows(t.v + u * b.keys * dvp, b.keys, dvp, t.v_e + u * row_e * dvp);
            memset(ot, 0, dvp * ld * sizeof(float));
            for (i64 j = 0; j < ld; j++) top[j] = -FLT_MAX, sum[j] = 0;  // not -inf: -inf less -inf is NaN
            for (i64 u = 0; u < a.keys; u += t.chunk) {
                i64 rows = min(t.chunk, a.keys - u), keys = rows * b.keys;
                t.logits(u, rows, b.keys, t.s);
                for (i64 j = 0; j < ld; j += LANES) {
                    Vec high = at(top + j);
                    for (i64 r = 0; r < keys; r++) {
                        Vec x = at(t.s + r * ld + j);
                        high = high > x ? high : x;
                    }
                    Vec ratio = exponential(at(top + j) - high), total = Vec{};
                    for (i64 i = 0; i < rows; i++) {
                        float* row = t.s + i * b.keys * ld + j;
                        Vec part = Vec{};  // sums of sums round less
                        if constexpr (t.pairs) {  // in place: two rows of weights become one
                            Pair* to = reinterpret_cast<Pair*>(t.s) + i * row_e * ld + j;
                            for (i64 w = 0; w < b.keys; w += 2) {
                                Vec e = exponential(at(row + w * ld) - high), f = Vec{};
                                if (w + 1 < b.keys) f = exponential(at(row + (w + 1) * ld) - high);
                                at(to + w / 2 * ld) = pack(e, f);
                                part += e + f;
                            }
                        } else {
                            for (i64 w = 0; w < b.keys; w++)
                                part += at(row + w * ld) = exponential(at(row + w * ld) - high);
                        }
                        total += part;
                    }
                    at(top + j) = high, at(sum + j) = at(sum + j) * ratio + total, at(t.alpha + j) = ratio;
                }
                outputs(t.v_e + u * row_e * dvp, dvp, p.dim_v, (typename Tile<T>::E*)t.s, ld, rows * row_e, ot,
                        t.alpha, 1);
            }
            for (i64 j = 0; j < ld; j += LANES) {
                Vec inverse = 1.0f / at(sum + j);
                for (i64 c = 0; c < p.dim_v; c++) at(ot + c * ld + j) *= inverse;
            }
            transpose(ot, ld, dvp, ld, t.o, dvp);
            for (i64 y = 0; y < a.queries; y++)
                for (i64 x = 0; x < b.queries; x++) {
                    i64 j = y * b.queries + x;
                    i64 to = ((image * p.height_q + a.query + y) * p.width_q + b.query + x) * p.heads + head;
                    store(t.o + j * dvp, out + to * p.dim_v, p.dim_v, 1);
                    saved[2 * to] = top[j], saved[2 * to + 1] = sum[j];
                }
        }
    }
    return 0;
}

// ---- backward -----------------------------------------------------------------------------------------------------

template <class T>
struct Backward : Tile<T> {
    static const i64 WHOLE = 1 << 17;  // scores of a tile: half of them and half of their gradients fill 512 kB

    typedef Tile<T> Base;
    using E = typename Base::E;
    i64 map_w, kept;  // columns of the map with its ring; how many of its rows are kept: those of a window
    bool whole;            // all scores of a tile are kept, not those of a chunk
    float *dk_map, *dv_map, *g, *gt, *dqt, *drh, *drw, *w, *ds, *delta, *top, *inverse;
    E *gt_e, *g_e, *q_e, *ds_e, *k_rows;
    Backward(const Problem& p, const float* tables, Arena& arena) : Base(p, tables, arena) {
        i64 lanes = this->max_lanes(p), keys = this->max_keys(p, p.height) * this->max_keys(p, p.width);
        i64 dp = this->dp, dvp = this->dvp;
        map_w = p.width + 2 * p.ring, kept = this->max_keys(p, p.height);
        dk_map = arena.take(kept * map_w * dp), dv_map = arena.take(kept * map_w * dvp);
        g = arena.take(lanes * dvp), gt = arena.take(lanes * dvp), dqt = arena.take(lanes * dp);
        drh = arena.take(lanes * this->max_tables(p, p.height, p.height_q));
        drw = arena.take(lanes * this->max_tables(p, p.width, p.width_q));
        whole = keys * lanes <= WHOLE;
        i64 size = whole ? max(keys * lanes, this->chunk_size(p)) : this->chunk_size(p);
        w = arena.take(size), ds = arena.take(size);
        delta = arena.take(lanes), top = arena.take(lanes), inverse = arena.take(lanes);
        gt_e = this->elements(gt, lanes * dvp, arena), g_e = this->elements(g, lanes * dvp, arena);
        q_e = this->elements(this->q, lanes * dp, arena);
        ds_e = this->elements(ds, this->chunk_size(p), arena);
        k_rows = this->k_e;
        if constexpr (Base::pairs) k_rows = this->elements(this->k, keys * dp, arena);
    }

    // Weights and their gradients, of window rows u to u + rows.
    void weigh(i64 u, i64 rows, i64 keys, float* weights, float* dweights) {
        i64 ld = this->ld;
        this->logits(u, rows, keys, weights);
        scores(this->v_e + u * keys * this->dvp, this->dvp, rows * keys, gt_e, ld, this->count(this->p.dim_v), dweights,
               1, nullptr, nullptr);
        for (i64 j = 0; j < ld; j += LANES) {
            Vec high = at(top + j), factor = at(inverse + j);
            for (i64 r = 0; r < rows * keys; r++) {
                Vec& x = at(weights + r * ld + j);
                x = exponential(x - high) * factor;
            }
        }
    }

    // where the gradients of a row of the image (or its ring) are, in map pixels: row by row over those that are kept
    i64 map_row(i64 y) const { return (y + this->p.ring) % kept * map_w; }

    // Rows from..to of the image have all their gradients: out with them, and 0 for the rows that take their place.
    void finish(i64 from, i64 to, i64 image, i64 head, T* dk, T* dv) {
        const Problem& p = this->p;
        for (i64 y = from; y < to; y++) {
            float *k_row = dk_map + map_row(y) * this->dp, *v_row = dv_map + map_row(y) * this->dvp;
            for (i64 x = 0; x < p.width && y >= 0 && y < p.height; x++) {
                i64 at = (image * p.height + y) * p.width + x;
                store(k_row + (x + p.ring) * this->dp, dk + at * p.dk_pixel + head * p.dk_head, p.dim, p.scale);
                store(v_row + (x + p.ring) * this->dvp, dv + at * p.dv_pixel + head * p.dv_head, p.dim_v, 1);
            }
            memset(k_row, 0, map_w * this->dp * sizeof(float));
            memset(v_row, 0, map_w * this->dvp * sizeof(float));
        }
    }

    // Gradients through one table, from those of the relative logits (key row or column, query). `table` and `dtable`
    // begin with the first row in use.
    void through_table(float* x, const Span& span, const int32_t* shift, const float* table, float* dtable,
                       bool finite) {
        const Problem& p = this->p;
        i64 ld = this->ld, dp = this->dp;
        if (finite) {  // all rows times all queries, with zeros where they have nothing to do with each other
            this->unskew(x, span, shift);
            outputs(table, dp, p.dim, x, ld, span.tables, dqt, nullptr, 1);
            gradients(x, ld, span.tables, this->nq, this->q, dp, dtable);
            return;
        }
        // zeros would turn a query or a row that is not finite into NaN for all others: pair by pair, slow but rare
        for (i64 j = 0; j < this->nq; j++)
            for (i64 u = 0; u < span.keys; u++) {
                i64 row = (u + shift[j] * p.step) * dp;
                for (i64 c = 0; c < p.dim; c++) {
                    dqt[c * ld + j] += x[u * ld + j] * table[row + c];
                    dtable[row + c] += x[u * ld + j] * this->q[j * dp + c];
                }
            }
    }
};

// Returns 0, or how many bytes one thread would need that could not be had.
template <class T>
i64 backward(const Problem& p, const T* q, const T* k, const T* v, const float* rel_h, const float* rel_w,
             const float* saved, const T* grad, T* dq, T* dk, T* dv, float* drel_h, float* drel_w) {
    Arena count;
    Backward<T>(p, nullptr, count);
    i64 table_size = 2 * p.table() * p.dim_pad(), maps = p.batch * p.heads;
    i64 each = round_up(count.used, 1024), all_tables = table_size * (maps + 1), threads = p.threads;
    Scratch shared;
    Kept kept{threads};
    if (!shared.reserve(all_tables) || !scratch.reserve(each, threads)) return (all_tables + each) * sizeof(float);
    float* memory = scratch.base;
    scaled_tables(p, rel_h, rel_w, shared.base);
    bool finite_tables = all_finite(shared.base, table_size);
    float* drel = shared.base + table_size;
    float rel_scale = p.scale_rel ? p.scale : 1;
#pragma omp parallel num_threads(threads)
    {
        typedef Backward<T> B;
        using E = typename B::E;
        Arena arena{memory + each * thread_number()};
        B t(p, shared.base, arena);
        i64 dp = t.dp, dvp = t.dvp;
        float *g = t.g, *gt = t.gt, *dqt = t.dqt, *drh = t.drh, *drw = t.drw;
        float *delta = t.delta, *top = t.top, *inverse = t.inverse;
        memset(t.dk_map, 0, t.kept * t.map_w * dp * sizeof(float));
        memset(t.dv_map, 0, t.kept * t.map_w * dvp * sizeof(float));
#pragma omp for schedule(dynamic, 1)
        for (i64 m = 0; m < maps; m++) {
            i64 image = m / p.heads, head = m % p.heads;
            float* dtable = drel + m * table_size;
            memset(dtable, 0, table_size * sizeof(float));
            i64 done = -p.ring;  // rows before this one are complete
            for (i64 block = 0; block < p.blocks_h() * p.blocks_w(); block++) {
                Span a(p, block / p.blocks_w(), p.height, p.height_q), b(p, block % p.blocks_w(), p.width, p.width_q);
                t.finish(done, a.key, image, head, dk, dv);
                done = a.key;
                t.start(q, k, v, image, head, a, b);
                i64 ld = t.ld, row_e = t.count(b.keys);
                auto place = [&](i64 y, i64 x) {
                    return (image * p.height_q + a.query + y) * p.width_q + b.query + x;
                };
                i64 col = p.heads * p.dim_v, row = p.width_q * col;
                t.gather_queries(grad + image * p.height_q * row + head * p.dim_v, row, col, a, b, g, gt, p.dim_v, dvp);
                if constexpr (t.pairs) {
                    pair_rows(gt, dvp, ld, t.gt_e);
                    pair_rows(g, ld, dvp, t.g_e);
                    pair_rows(t.q, ld, dp, t.q_e);
                    pair_columns(t.v, a.keys * b.keys, dvp, t.v_e);
                    for (i64 u = 0; u < a.keys; u++)
                        pair_rows(t.k + u * b.keys * dp, b.keys, dp, t.k_rows + u * row_e * dp);
                }
                memset(top, 0, ld * sizeof(float));
                memset(inverse, 0, ld * sizeof(float));
                memset(delta, 0, ld * sizeof(float));
                for (i64 j = 0; j < t.nq; j++) {
                    const float* x = saved + 2 * (place(j / b.queries, j % b.queries) * p.heads + head);
                    top[j] = x[0], inverse[j] = 1 / x[1];
                }
                for (i64 u = 0; u < a.keys; u += t.chunk) {
                    i64 rows = min(t.chunk, a.keys - u), from = t.whole ? u * b.keys * ld : 0;
                    t.weigh(u, rows, b.keys, t.w + from, t.ds + from);
                    for (i64 j = 0; j < ld; j += LANES) {
                        for (i64 i = 0; i < rows; i++) {  // sums of sums round less
                            float *w_row = t.w + from + i * b.keys * ld + j, *ds_row = t.ds + (w_row - t.w);
                            Vec total = Vec{};
                            for (i64 w = 0; w < b.keys; w++) total += at(w_row + w * ld) * at(ds_row + w * ld);
                            at(delta + j) += total;
                        }
                    }
                }
                memset(dqt, 0, dp * ld * sizeof(float));
                memset(drh, 0, a.tables * ld * sizeof(float));
                memset(drw, 0, b.tables * ld * sizeof(float));
                for (i64 u = 0; u < a.keys; u += t.chunk) {
                    i64 rows = min(t.chunk, a.keys - u), from = t.whole ? u * b.keys * ld : 0;
                    if (!t.whole) t.weigh(u, rows, b.keys, t.w, t.ds);
                    for (i64 i = 0; i < rows; i++) {
                        float *w_row = t.w + from + i * b.keys * ld, *ds_row = t.ds + from + i * b.keys * ld;
                        for (i64 j = 0; j < ld; j += LANES) {
                            Vec total = Vec{}, mean = at(delta + j);
                            for (i64 w = 0; w < b.keys; w++) {
                                Vec x = at(w_row + w * ld + j) * (at(ds_row + w * ld + j) - mean);
                                at(ds_row + w * ld + j) = x;
                                at(drw + w * ld + j) += x;
                                total += x;
                            }
                            at(drh + (u + i) * ld + j) = total;
                        }
                        if constexpr (t.pairs) {
                            // the last pair's lane without a query: its products with a key need not be finite
                            for (i64 w = 0; w < b.keys && t.nq % 2; w++)
                                w_row[w * ld + t.nq] = ds_row[w * ld + t.nq] = 0;
                            pair_rows(ds_row, b.keys, ld, t.ds_e + i * row_e * ld);
                            pair_columns(ds_row, b.keys, ld, reinterpret_cast<Pair*>(ds_row));
                            pair_columns(w_row, b.keys, ld, reinterpret_cast<Pair*>(w_row));
                        }
                        i64 to = t.map_row(a.key + u + i) + b.key + p.ring;
                        gradients((E*)w_row, ld, b.keys, t.count(t.nq), t.g_e, dvp, t.dv_map + to * dvp);
                        gradients((E*)ds_row, ld, b.keys, t.count(t.nq), t.q_e, dp, t.dk_map + to * dp);
                    }
                    E* ds_rows = t.ds_e + (t.pairs ? 0 : from);
                    outputs(t.k_rows + u * row_e * dp, dp, p.dim, ds_rows, ld, rows * row_e, dqt, nullptr, p.scale);
                }
                i64 th = a.table * dp, tw = (p.table() + b.table) * dp;
                bool finite = finite_tables && all_finite(t.q, ld * dp);
                t.through_table(drh, a, t.shift_h, t.tables + th, dtable + th, finite);
                t.through_table(drw, b, t.shift_w, t.tables + tw, dtable + tw, finite);
                transpose(dqt, ld, dp, ld, t.q, dp);  // the queries are done with
                for (i64 y = 0; y < a.queries; y++)
                    for (i64 x = 0; x < b.queries; x++) {
                        T* to = dq + place(y, x) * p.dq_pixel + head * p.dq_head;
                        store(t.q + (y * b.queries + x) * dp, to, p.dim, 1);
                    }
            }
            t.finish(done, p.height + p.ring, image, head, dk, dv);
        }
        // the maps' gradients of the tables, summed in a fixed order
#pragma omp for schedule(static)
        for (i64 t = 0; t < 2 * p.table(); t++) {
            float* to = t < p.table() ? drel_h + t * p.dim : drel_w + (t - p.table()) * p.dim;
            for (i64 c = 0; c < p.dim; c += LANES) {
                double total[LANES] = {};
                for (i64 m = 0; m < maps; m++) {
                    const float* part = drel + m * table_size + t * dp + c;
                    UNROLL for (int j = 0; j < LANES; j++) total[j] += part[j];
                }
                for (i64 j = 0; j < min(LANES, p.dim - c); j++) to[c + j] = (float)(total[j] * rel_scale);
            }
        }
    }
    return 0;
}

}  // namespace

#define ENTRY(SUFFIX, T)                                                                                              \
    extern "C" i64 halo_forward_##SUFFIX(const Problem* p, const T* q, const T* k, const T* v, const float* rel_h,    \
                                         const float* rel_w, T* out, float* saved) {                                  \
        return forward<T>(*p, q, k, v, rel_h, rel_w, out, saved);                                                     \
    }                                                                                                                 \
    extern "C" i64 halo_backward_##SUFFIX(const Problem* p, const T* q, const T* k, const T* v, const float* rel_h,   \
                                          const float* rel_w, const float* saved, const T* grad, T* dq, T* dk, T* dv, \
                                          float* drel_h, float* drel_w) {                                             \
        return backward<T>(*p, q, k, v, rel_h, rel_w, saved, grad, dq, dk, dv, drel_h, drel_w);                       \
    }

ENTRY(float32, float)
ENTRY(bfloat16, uint16_t)
