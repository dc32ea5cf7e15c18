// Y = W X for a sparse W of shape (M, K) and dense X of K rows and N columns, float32.
//
// Columns are taken in tiles of at most 64, four vectors of 16. A tile of X is packed, K rows of it next to each other,
// so that it stays in the second-level cache whatever the strides of X are; then the nonzeros of each row of W stream by
// while the row's piece of Y is held in registers. R rows of W (1, 2 or 4) share a pattern: what is loaded of X serves
// all of them.
//
// "Tokens" means that a column of X is contiguous, as for a linear layer over (..., K): tiles are then transposed, 16 by
// 16, on the way in and out. Otherwise X is (batch, K, N) and Y is (batch, M, N), as for a 1x1 convolution; the columns
// of all samples are numbered through, so that a tile may span several small images.
#include <cstdint>
#include <cstdlib>
#include <cstring>
#ifdef _OPENMP
#include <omp.h>
#endif

namespace {

typedef float vec __attribute__((vector_size(64), aligned(4), may_alias));
constexpr int LANES = 16;
constexpr int MOST = 4;   // vectors a tile
constexpr int GROUP = 16; // rows of Y that are made before they are written

struct Problem {
    const float *x, *values, *bias;
    float *y;
    const int32_t *columns, *pointers;
    int64_t rows, depth, width, batch;
    int block;
    bool tokens;
};

struct Scratch {
    float *at = nullptr;
    size_t size = 0;
    ~Scratch() { std::free(at); }
    float *hold(size_t wanted) {
        if (wanted > size) {
            std::free(at);
            size = (wanted + 1023) / 1024 * 1024;
            at = static_cast<float *>(std::aligned_alloc(64, size * sizeof(float)));
            if (at == nullptr) size = 0;
        }
        return at;
    }
};

thread_local Scratch scratch;

// Four rounds of perfect shuffles turn sixteen rows into sixteen columns.
inline void transpose(vec (&r)[LANES]) {
    for (int round = 0; round < 4; round++) {
        vec s[LANES];
        for (int i = 0; i < LANES / 2; i++) {
            s[2 * i] = __builtin_shufflevector(r[i], r[i + 8], 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
            s[2 * i + 1] =
                __builtin_shufflevector(r[i], r[i + 8], 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
        }
        for (int i = 0; i < LANES; i++) r[i] = s[i];
    }
}

// Pack columns first .. first + count of X as (depth, vectors * 16), zeros behind the last.
void pack(const Problem &p, float *tile, int64_t first, int count, int vectors) {
    const int64_t stride = vectors * LANES, depth = p.depth;
    if (p.tokens) {
        for (int lane = 0; lane < stride; lane += LANES) {
            const float *source = p.x + (first + lane) * depth;
            const int here = count - lane < LANES ? (count > lane ? count - lane : 0) : LANES;
            int64_t k = 0;
            if (here == LANES)
                for (; k + LANES <= depth; k += LANES) {
                    vec r[LANES];
                    for (int i = 0; i < LANES; i++) r[i] = *reinterpret_cast<const vec *>(source + i * depth + k);
                    transpose(r);
                    for (int i = 0; i < LANES; i++) *reinterpret_cast<vec *>(tile + (k + i) * stride + lane) = r[i];
                }
            for (; k < depth; k++)
                for (int i = 0; i < LANES; i++) tile[k * stride + lane + i] = i < here ? source[i * depth + k] : 0.0f;
        }
        return;
    }
    if (count < stride)
        for (int64_t k = 0; k < depth; k++) std::memset(tile + k * stride + count, 0, (stride - count) * sizeof(float));
    for (int done = 0; done < count;) {
        const int64_t sample = (first + done) / p.width, place = (first + done) % p.width;
        const int run = p.width - place < count - done ? int(p.width - place) : count - done;
        const float *source = p.x + sample * depth * p.width + place;
        if (run == MOST * LANES)
            for (int64_t k = 0; k < depth; k++)
                for (int v = 0; v < MOST; v++)
                    *reinterpret_cast<vec *>(tile + k * stride + v * LANES) =
                        *reinterpret_cast<const vec *>(source + k * p.width + v * LANES);
        else
            for (int64_t k = 0; k < depth; k++)
                std::memcpy(tile + k * stride + done, source + k * p.width, run * sizeof(float));
        done += run;
    }
}

// Write rows of Y, held as (count_rows, vectors * 16), to columns first .. first + count.
void write(const Problem &p, const float *made, int64_t row, int count_rows, int64_t first, int count, int vectors) {
    const int64_t stride = vectors * LANES;
    if (p.tokens) {
        for (int lane = 0; lane < count; lane += LANES) {
            const int here = count - lane < LANES ? count - lane : LANES;
            float *target = p.y + (first + lane) * p.rows + row;
            if (count_rows == GROUP) {
                vec r[LANES];
                for (int i = 0; i < LANES; i++) r[i] = *reinterpret_cast<const vec *>(made + i * stride + lane);
                transpose(r);
                for (int i = 0; i < here; i++) *reinterpret_cast<vec *>(target + i * p.rows) = r[i];
            } else {
                for (int i = 0; i < here; i++)
                    for (int m = 0; m < count_rows; m++) target[i * p.rows + m] = made[m * stride + lane + i];
            }
        }
        return;
    }
    for (int done = 0; done < count;) {
        const int64_t sample = (first + done) / p.width, place = (first + done) % p.width;
        const int run = p.width - place < count - done ? int(p.width - place) : count - done;
        for (int m = 0; m < count_rows; m++)
            std::memcpy(p.y + (sample * p.rows + row + m) * p.width + place, made + m * stride + done,
                        run * sizeof(float));
        done += run;
    }
}

// R rows that share a pattern, V vectors of columns.
template <int R, int V>
inline void multiply(const float *tile, const float *values, const int32_t *columns, int32_t count, const float *bias,
                     float *made, int64_t stride) {
    vec sum[R][V];
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) sum[r][v] = vec{} + (bias ? bias[r] : 0.0f);
    int32_t j = 0;
    if constexpr (R * V <= 4) { // too few sums to hide the latency of one addition: even and odd nonzeros apart
        vec other[R][V] = {};
        for (; j + 1 < count; j += 2) {
            const float *a = tile + int64_t(columns[j]) * (V * LANES);
            const float *b = tile + int64_t(columns[j + 1]) * (V * LANES);
            for (int r = 0; r < R; r++)
                for (int v = 0; v < V; v++) {
                    sum[r][v] += values[j * R + r] * *reinterpret_cast<const vec *>(a + v * LANES);
                    other[r][v] += values[(j + 1) * R + r] * *reinterpret_cast<const vec *>(b + v * LANES);
                }
        }
        for (int r = 0; r < R; r++)
            for (int v = 0; v < V; v++) sum[r][v] += other[r][v];
    }
    for (; j < count; j++) {
        const float *a = tile + int64_t(columns[j]) * (V * LANES);
        for (int v = 0; v < V; v++) {
            const vec x = *reinterpret_cast<const vec *>(a + v * LANES);
            for (int r = 0; r < R; r++) sum[r][v] += values[j * R + r] * x;
        }
    }
    for (int r = 0; r < R; r++)
        for (int v = 0; v < V; v++) *reinterpret_cast<vec *>(made + r * stride + v * LANES) = sum[r][v];
}

template <int R, int V>
void rows_of(const Problem &p, const float *tile, float *made, int64_t from, int64_t to, int64_t first, int count) {
    const int64_t place = first % p.width;
    // Where a tile is whole and of one sample, rows go to Y at once.
    const bool whole = !p.tokens && count == V * LANES && place + count <= p.width;
    const int64_t stride = whole ? p.width : V * LANES;
    float *y = p.y + first / p.width * p.rows * p.width + place;
    for (int64_t row = from; row < to; row += GROUP) {
        const int here = to - row < GROUP ? int(to - row) : GROUP;
        for (int r = 0; r < here; r += R) {
            const int64_t each = (row + r) / R;
            const int32_t begin = p.pointers[each];
            multiply<R, V>(tile, p.values + int64_t(begin) * R, p.columns + begin, p.pointers[each + 1] - begin,
                           p.bias ? p.bias + row + r : nullptr, whole ? y + (row + r) * stride : made + r * stride,
                           stride);
        }
        if (!whole) write(p, made, row, here, first, count, V);
    }
}

template <int R>
void tile_of(const Problem &p, const float *tile, float *made, int64_t from, int64_t to, int64_t first, int count,
             int vectors) {
    if (vectors == 1) rows_of<R, 1>(p, tile, made, from, to, first, count);
    else if (vectors == 2) rows_of<R, 2>(p, tile, made, from, to, first, count);
    else if (vectors == 3) rows_of<R, 3>(p, tile, made, from, to, first, count);
    else rows_of<R, 4>(p, tile, made, from, to, first, count);
}

} // namespace

// Returns 0, or 1 where memory for a tile cannot be had. All arrays are contiguous; block divides rows.
extern "C" int torchgraft_sparse_product(const float *x, float *y, const float *values, const int32_t *columns,
                                         const int32_t *pointers, const float *bias, int64_t rows, int64_t depth,
                                         int64_t width, int64_t batch, int32_t block, int32_t tokens, int32_t threads) {
    const Problem p{x, values, bias, y, columns, pointers, rows, depth, width, batch, block, tokens != 0};
    const int64_t total = width * batch;
    int most = MOST;
    while (most > 1 && depth * most * LANES * int64_t(sizeof(float)) > (1 << 20)) most /= 2;
    const int64_t step = most * LANES, tiles = (total + step - 1) / step;
    const int64_t groups = (rows + GROUP - 1) / GROUP;
    // Where there are fewer tiles than threads, the rows of a tile are shared out, and each thread packs for itself.
    const int64_t parts = tiles >= threads ? 1 : (threads + tiles - 1) / tiles;
    const int64_t share = (groups + parts - 1) / parts * GROUP;
    int failed = 0;
#ifdef _OPENMP
#pragma omp parallel for schedule(dynamic) num_threads(threads) if (threads > 1)
#endif
    for (int64_t job = 0; job < tiles * parts; job++) {
        const int64_t first = job / parts * step, from = job % parts * share;
        const int64_t to = from + share < rows ? from + share : rows;
        if (from >= to) continue;
        float *tile = scratch.hold((depth + GROUP) * step);
        if (tile == nullptr) {
            failed = 1;
            continue;
        }
        float *made = tile + depth * step;
        const int count = total - first < step ? int(total - first) : int(step);
        const int vectors = (count + LANES - 1) / LANES;
        pack(p, tile, first, count, vectors);
        if (block == 4) tile_of<4>(p, tile, made, from, to, first, count, vectors);
        else if (block == 2) tile_of<2>(p, tile, made, from, to, first, count, vectors);
        else tile_of<1>(p, tile, made, from, to, first, count, vectors);
    }
    return failed;
}
