// Halo attention for CPUs, forward and backward; called through ctypes by native.py, so no PyTorch headers.
//
// One (image, block, head) is a tile. Queries are the vector lanes and keys the rows of every score matrix
// S[key][query] (blocks of 8 x 8 and 4 x 4 queries fill whole vectors, and windows of 14 or 11 keys need no padding),
// so the softmax needs no sums across lanes. Keys go by in chunks of some window rows whose scores stay in the L1
// cache: the forward keeps a running maximum, the backward computes the weights again from the logsumexp. Tables of
// relative positions are used as a few more keys: their products with the queries, skewed by the query's position,
// start the scores, and their gradients come from the same three small matrix products as those of the keys.
//
// Everything is computed in float32, but that for bfloat16 inputs, on CPUs with its dot product, the products take
// bfloat16 pairs: the inputs as they are, the weights and their gradients rounded (their sums are of the unrounded).
// Results do not depend on the number of threads: tiles are independent in the forward, and in the backward one thread
// walks all blocks of an (image, head) in order.

#include "native_products.h"

namespace {

// ---- geometry ----------------------------------------------------------------------------------------------------

struct Problem {  // filled by native.py, in this order
    i64 batch, height_q, width_q, heads, dim, height, width, dim_v;
    i64 block, halo, stride, ring, step, scale_rel, threads;
    i64 q_batch, q_row, q_col, q_head;
    i64 k_batch, k_row, k_col, k_head;
    i64 v_batch, v_row, v_col, v_head;
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

struct Scratch {
    float* base = nullptr;
    i64 size = 0, used = 0;
    void reserve(i64 n) {
        used = 0;
        if (n <= size) return;
        free(base);
        size = round_up(n, 1024);
        base = static_cast<float*>(aligned_alloc(64, size * sizeof(float)));
        if (!base) abort();
    }
    float* take(i64 n) {
        float* p = base + used;
        used += round_up(n, 16);
        return p;
    }
    ~Scratch() { free(base); }
};

thread_local Scratch scratch;  // kept between calls: fresh pages cost more than small tiles

const i64 CHUNK = 5376;  // scores at once: 6 rows of a window of 14 for 64 queries, two thirds of a small L1 cache

// The buffers of one tile, and what forward and backward both do with them.
template <class T>
struct Tile {
    static const bool pairs = PAIRS && std::is_same_v<T, uint16_t>;
    using E = std::conditional_t<pairs, Pair, float>;
    const Problem& p;
    const float* tables;  // scaled: height, then width, rows of dim_pad
    i64 dp, dvp, ld = 0, nq = 0, chunk = 0;
    float *q, *qt, *k, *v, *rh, *rw, *s;
    E *qt_e, *k_e, *v_e;  // what the products with them take
    int32_t *shift_h, *shift_w;  // of each query, in steps: how far its row or column is from the last one's

    static i64 max_lanes(const Problem& p) {
        i64 side = p.block / p.stride;
        return round_up(min(side, p.height_q) * min(side, p.width_q), LANES);
    }
    static i64 max_keys(const Problem& p, i64 length) { return min(p.window(), length + 2 * p.ring); }
    static i64 chunk_rows(i64 keys, i64 lanes) { return max(1, CHUNK / (keys * lanes)); }
    static i64 chunk_size(const Problem& p) { return max(CHUNK, max_keys(p, p.width) * max_lanes(p)); }
    static i64 floats(const Problem& p) {
        i64 n = max_lanes(p), keys = max_keys(p, p.height) * max_keys(p, p.width);
        return 2 * n * p.dim_pad() + keys * (p.dim_pad() + p.dim_v_pad()) + 2 * n * (p.table() + 1) +
               n * p.dim_pad() + 2 * keys * (p.dim_pad() + p.dim_v_pad()) +
               chunk_size(p) + 16 * 16;
    }
    Tile(const Problem& p, const float* tables) : p(p), tables(tables), dp(p.dim_pad()), dvp(p.dim_v_pad()) {
        i64 n = max_lanes(p), keys = max_keys(p, p.height) * max_keys(p, p.width);
        q = scratch.take(n * dp), qt = scratch.take(n * dp);
        k = scratch.take(keys * dp), v = scratch.take(keys * dvp);
        rh = scratch.take(n * p.table()), rw = scratch.take(n * p.table());
        shift_h = reinterpret_cast<int32_t*>(scratch.take(n)), shift_w = reinterpret_cast<int32_t*>(scratch.take(n));
        s = scratch.take(chunk_size(p));
        qt_e = elements(qt, n * dp), k_e = elements(k, keys * dp), v_e = elements(v, keys * dvp);
    }

    static E* elements(float* x, i64 n) {  // x itself, or memory for n elements made of it
        if constexpr (pairs) return reinterpret_cast<E*>(scratch.take(n));
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

    void logits(i64 u, i64 rows, i64 keys) {  // of window rows u to u + rows, into s
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

// ---- forward and backward ----------------------------------------------------------------------------------------

template <class T>
void forward(const Problem& p, const T* q, const T* k, const T* v, const float* rel_h, const float* rel_w, T* out,
             float* lse) {
    Scratch shared;
    shared.reserve(2 * p.table() * p.dim_pad());
    scaled_tables(p, rel_h, rel_w, shared.base);
    i64 blocks_w = p.blocks_w(), tiles = p.batch * p.blocks_h() * blocks_w * p.heads;
#pragma omp parallel num_threads(p.threads)
    {
        i64 lanes = Tile<T>::max_lanes(p), dvp = p.dim_v_pad();
        scratch.reserve(Tile<T>::floats(p) + lanes * (2 * dvp + 3) + 64);
        Tile<T> t(p, shared.base);
        float *ot = scratch.take(lanes * dvp), *o = scratch.take(lanes * dvp);
        float *top = scratch.take(lanes), *sum = scratch.take(lanes), *alpha = scratch.take(lanes);
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
            for (i64 j = 0; j < ld; j++) top[j] = -1e30f, sum[j] = 0;
            for (i64 u = 0; u < a.keys; u += t.chunk) {
                i64 rows = min(t.chunk, a.keys - u), keys = rows * b.keys;
                t.logits(u, rows, b.keys);
                for (i64 j = 0; j < ld; j += LANES) {
                    Vec high = at(top + j);
                    for (i64 r = 0; r < keys; r++) {
                        Vec x = at(t.s + r * ld + j);
                        high = high > x ? high : x;
                    }
                    Vec ratio = exponential(at(top + j) - high), total = Vec{};
                    for (i64 i = 0; i < rows; i++) {
                        float* row = t.s + i * b.keys * ld + j;
                        if constexpr (t.pairs) {  // in place: two rows of weights become one
                            Pair* to = reinterpret_cast<Pair*>(t.s) + i * row_e * ld + j;
                            for (i64 w = 0; w < b.keys; w += 2) {
                                Vec e = exponential(at(row + w * ld) - high), f = Vec{};
                                if (w + 1 < b.keys) f = exponential(at(row + (w + 1) * ld) - high);
                                at(to + w / 2 * ld) = pack(e, f);
                                total += e + f;
                            }
                        } else {
                            for (i64 w = 0; w < b.keys; w++)
                                total += at(row + w * ld) = exponential(at(row + w * ld) - high);
                        }
                    }
                    at(top + j) = high, at(sum + j) = at(sum + j) * ratio + total, at(alpha + j) = ratio;
                }
                outputs(t.v_e + u * row_e * dvp, dvp, p.dim_v, (typename Tile<T>::E*)t.s, ld, rows * row_e, ot,
                        alpha, 1);
            }
            for (i64 j = 0; j < ld; j += LANES) {
                Vec inverse = 1.0f / at(sum + j);
                for (i64 c = 0; c < p.dim_v; c++) at(ot + c * ld + j) *= inverse;
            }
            transpose(ot, ld, dvp, ld, o, dvp);
            for (i64 y = 0; y < a.queries; y++)
                for (i64 x = 0; x < b.queries; x++) {
                    i64 j = y * b.queries + x;
                    i64 to = ((image * p.height_q + a.query + y) * p.width_q + b.query + x) * p.heads + head;
                    store(o + j * dvp, out + to * p.dim_v, p.dim_v, 1);
                    lse[to] = top[j] + std::log(sum[j]);
                }
        }
    }
}

template <class T>
void backward(const Problem& p, const T* q, const T* k, const T* v, const float* rel_h, const float* rel_w,
              const T* out, const float* lse, const T* grad, T* dq, T* dk, T* dv, float* drel_h, float* drel_w) {
    i64 dp = p.dim_pad(), dvp = p.dim_v_pad(), table_size = 2 * p.table() * dp, maps = p.batch * p.heads;
    Scratch shared;
    shared.reserve(table_size * (maps + 1));
    scaled_tables(p, rel_h, rel_w, shared.base);
    float* drel = shared.base + table_size;
    i64 map_h = p.height + 2 * p.ring, map_w = p.width + 2 * p.ring;
    float rel_scale = p.scale_rel ? p.scale : 1;
#pragma omp parallel num_threads(p.threads)
    {
        i64 lanes = Tile<T>::max_lanes(p);
        using E = typename Tile<T>::E;
        i64 map_size = map_h * map_w * (dp + dvp);
        scratch.reserve(Tile<T>::floats(p) + map_size + 2 * Tile<T>::chunk_size(p) + 16 * 16 + 2 * lanes * (dp + dvp) +
                        lanes * (2 * dvp + dp + 2 * p.table() + 2) + dvp);
        Tile<T> t(p, shared.base);
        float *dk_map = scratch.take(map_h * map_w * dp), *dv_map = scratch.take(map_h * map_w * dvp);
        float *g = scratch.take(lanes * dvp), *gt = scratch.take(lanes * dvp), *dqt = scratch.take(lanes * dp);
        float *drh = scratch.take(lanes * p.table()), *drw = scratch.take(lanes * p.table());
        float* o = scratch.take(dvp);
        float *ds = scratch.take(Tile<T>::chunk_size(p)), *delta = scratch.take(lanes), *norm = scratch.take(lanes);
        E *gt_e = t.elements(gt, lanes * dvp), *g_e = t.elements(g, lanes * dvp), *q_e = t.elements(t.q, lanes * dp);
        E *ds_e = t.elements(ds, Tile<T>::chunk_size(p)), *k_rows = t.k_e;
        i64 keys = Tile<T>::max_keys(p, p.height) * Tile<T>::max_keys(p, p.width);
        if constexpr (t.pairs) k_rows = t.elements(t.k, keys * dp);
#pragma omp for schedule(dynamic, 1)
        for (i64 m = 0; m < maps; m++) {
            i64 image = m / p.heads, head = m % p.heads;
            float* dtable = drel + m * table_size;
            memset(dtable, 0, table_size * sizeof(float));
            memset(dk_map, 0, map_h * map_w * dp * sizeof(float));
            memset(dv_map, 0, map_h * map_w * dvp * sizeof(float));
            for (i64 block = 0; block < p.blocks_h() * p.blocks_w(); block++) {
                Span a(p, block / p.blocks_w(), p.height, p.height_q), b(p, block % p.blocks_w(), p.width, p.width_q);
                t.start(q, k, v, image, head, a, b);
                i64 ld = t.ld, row_e = t.count(b.keys);
                auto place = [&](i64 y, i64 x) {
                    return ((image * p.height_q + a.query + y) * p.width_q + b.query + x) * p.heads + head;
                };
                i64 col = p.heads * p.dim_v, row = p.width_q * col;
                t.gather_queries(grad + image * p.height_q * row + head * p.dim_v, row, col, a, b, g, gt, p.dim_v, dvp);
                if constexpr (t.pairs) {
                    pair_rows(gt, dvp, ld, gt_e);
                    pair_rows(g, ld, dvp, g_e);
                    pair_rows(t.q, ld, dp, q_e);
                    pair_columns(t.v, a.keys * b.keys, dvp, t.v_e);
                    for (i64 u = 0; u < a.keys; u++)
                        pair_rows(t.k + u * b.keys * dp, b.keys, dp, k_rows + u * row_e * dp);
                }
                memset(norm, 0, ld * sizeof(float));
                memset(delta, 0, ld * sizeof(float));
                for (i64 y = 0; y < a.queries; y++)
                    for (i64 x = 0; x < b.queries; x++) {
                        i64 j = y * b.queries + x;
                        load(out + place(y, x) * p.dim_v, o, p.dim_v, 1);
                        Vec total = Vec{};
                        for (i64 c = 0; c < dvp; c += LANES) total += at(o + c) * at(g + j * dvp + c);
                        for (int c = 0; c < LANES; c++) delta[j] += total[c];
                        norm[j] = lse[place(y, x)];
                    }
                memset(dqt, 0, dp * ld * sizeof(float));
                memset(drh, 0, a.tables * ld * sizeof(float));
                memset(drw, 0, b.tables * ld * sizeof(float));
                for (i64 u = 0; u < a.keys; u += t.chunk) {
                    i64 rows = min(t.chunk, a.keys - u);
                    t.logits(u, rows, b.keys);
                    scores(t.v_e + u * b.keys * dvp, dvp, rows * b.keys, gt_e, ld, t.count(p.dim_v), ds, 1,
                           nullptr, nullptr);
                    for (i64 i = 0; i < rows; i++) {
                        float *s_row = t.s + i * b.keys * ld, *ds_row = ds + i * b.keys * ld;
                        for (i64 j = 0; j < ld; j += LANES) {
                            Vec total = Vec{}, n = at(norm + j), dl = at(delta + j);
                            for (i64 w = 0; w < b.keys; w++) {
                                Vec weight = exponential(at(s_row + w * ld + j) - n);
                                Vec x = weight * (at(ds_row + w * ld + j) - dl);
                                at(s_row + w * ld + j) = weight;
                                at(ds_row + w * ld + j) = x;
                                at(drw + w * ld + j) += x;
                                total += x;
                            }
                            at(drh + (u + i) * ld + j) = total;
                        }
                        if constexpr (t.pairs) {
                            pair_rows(ds_row, b.keys, ld, ds_e + i * row_e * ld);
                            pair_columns(ds_row, b.keys, ld, reinterpret_cast<Pair*>(ds_row));
                            pair_columns(s_row, b.keys, ld, reinterpret_cast<Pair*>(s_row));
                        }
                        i64 to = (a.key + p.ring + u + i) * map_w + b.key + p.ring;
                        gradients((E*)s_row, ld, b.keys, t.count(t.nq), g_e, dvp, dv_map + to * dvp);
                        gradients((E*)ds_row, ld, b.keys, t.count(t.nq), q_e, dp, dk_map + to * dp);
                    }
                    outputs(k_rows + u * row_e * dp, dp, p.dim, ds_e, ld, rows * row_e, dqt, nullptr, p.scale);
                }
                t.unskew(drh, a, t.shift_h);
                t.unskew(drw, b, t.shift_w);
                i64 th = a.table * dp, tw = (p.table() + b.table) * dp;
                outputs(t.tables + th, dp, p.dim, drh, ld, a.tables, dqt, nullptr, 1);
                outputs(t.tables + tw, dp, p.dim, drw, ld, b.tables, dqt, nullptr, 1);
                gradients(drh, ld, a.tables, t.nq, t.q, dp, dtable + th);
                gradients(drw, ld, b.tables, t.nq, t.q, dp, dtable + tw);
                transpose(dqt, ld, dp, ld, t.q, dp);  // the queries are done with
                for (i64 y = 0; y < a.queries; y++)
                    for (i64 x = 0; x < b.queries; x++)
                        store(t.q + (y * b.queries + x) * dp, dq + place(y, x) * p.dim, p.dim, 1);
            }
            for (i64 y = 0; y < p.height; y++)
                for (i64 x = 0; x < p.width; x++) {
                    i64 from = (y + p.ring) * map_w + x + p.ring;
                    i64 to = ((image * p.height + y) * p.width + x) * p.heads + head;
                    store(dk_map + from * dp, dk + to * p.dim, p.dim, p.scale);
                    store(dv_map + from * dvp, dv + to * p.dim_v, p.dim_v, 1);
                }
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
}

}  // namespace

#define ENTRY(SUFFIX, T)                                                                                              \
    extern "C" void halo_forward_##SUFFIX(const Problem* p, const T* q, const T* k, const T* v, const float* rel_h,   \
                                          const float* rel_w, T* out, float* lse) {                                   \
        forward<T>(*p, q, k, v, rel_h, rel_w, out, lse);                                                              \
    }                                                                                                                 \
    extern "C" void halo_backward_##SUFFIX(const Problem* p, const T* q, const T* k, const T* v, const float* rel_h,  \
                                           const float* rel_w, const T* out, const float* lse, const T* grad, T* dq,  \
                                           T* dk, T* dv, float* drel_h, float* drel_w) {                              \
        backward<T>(*p, q, k, v, rel_h, rel_w, out, lse, grad, dq, dk, dv, drel_h, drel_w);                           \
    }

ENTRY(float32, float)
ENTRY(bfloat16, uint16_t)
