// Passes of normalisation layers over float32 rows, compiled for the processor at hand; see native.py beside this file.
//
// Rows are contiguous. Sums of a row are taken in the lanes of vectors; column sums are kept for each thread and added
// in the order of the threads, so that the same number of threads gives the same sums.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#include <vector>

#ifdef __AVX__
#include <immintrin.h>
#endif

namespace {

// exp in float32, to about 2 ulp; infinities saturate, NaN stays.
inline float exponential(float x) {
  const float top = 88.0f, bottom = -87.0f;
  const float held = x > top ? top : (x < bottom ? bottom : x);
  const float turns = held * 1.44269504088896341f;
  const float whole = turns + 12582912.0f - 12582912.0f;  // to the nearest whole number
  float rest = held - whole * 0.693359375f;
  rest = rest + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

inline float sigmoid(float x) { return 1.0f / (1.0f + exponential(-x)); }

// Rows that are worked on at once in sums over columns, which stay in registers meanwhile.
constexpr int kRows = 8;

// The stretch of rows of this thread.
inline std::pair<int64_t, int64_t> stretch(int64_t rows) {
  const int64_t thread = omp_get_thread_num(), all = omp_get_num_threads();
  return {rows * thread / all, rows * (thread + 1) / all};
}

// Calls work(row, rows at once, thread) for kRows rows at once, and singly for the last ones of a thread.
template <typename Work>
void in_blocks(int64_t rows, int32_t threads, Work work) {
#pragma omp parallel num_threads(threads)
  {
    auto [row, last] = stretch(rows);
    for (; row + kRows <= last; row += kRows) work(row, std::integral_constant<int, kRows>{}, omp_get_thread_num());
    for (; row < last; ++row) work(row, std::integral_constant<int, 1>{}, omp_get_thread_num());
  }
}

// Outputs of more numbers than this outgrow the second-level cache. Their rows are written past the caches, so that no
// memory is fetched only to be overwritten; reading them afterwards included, that takes less time.
constexpr int64_t kPast = 1 << 20;
inline void write_past(float* to, const float* row, int64_t size) {
#ifdef __AVX__
  if (reinterpret_cast<uintptr_t>(to) % 32 == 0 && size % 8 == 0) {
    for (int64_t i = 0; i < size; i += 8) _mm256_stream_ps(to + i, _mm256_loadu_ps(row + i));
    return;
  }
#endif
  std::memcpy(to, row, size * sizeof(float));
}

// Rows that are worked off in their order; such blocks go from the last to the first, since the last rows of a pass
// before are still in the cache.
constexpr int64_t kBlock = 256;

// Calls work(row, to, thread) for each row of an output of (rows, width); to is where the row goes.
template <typename Work>
void each_row(float* out, int64_t rows, int64_t width, int32_t threads, Work work) {
  const bool past = rows * width > kPast;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> kept(past ? width : 0);
    const auto [first, last] = stretch(rows);
    for (int64_t end = last; end > first; end -= kBlock)
      for (int64_t row = std::max(first, end - kBlock); row < end; ++row) {
        float* to = out + row * width;
        work(row, past ? kept.data() : to, omp_get_thread_num());
        if (past) write_past(to, kept.data(), width);
      }
#ifdef __AVX__
    _mm_sfence();
#endif
  }
}

// Sums over the columns, several sets for each thread.
template <typename Number>
struct Columns {
  Columns(int32_t threads, int64_t sets, int64_t width)
      : threads(threads), sets(sets), width(width), values(threads * sets * width) {}

  Number* of(int64_t thread, int64_t set) { return values.data() + (thread * sets + set) * width; }

  // The sum of all threads.
  double total(int64_t set, int64_t column) {
    double sum = 0.0;
    for (int64_t thread = 0; thread < threads; ++thread) sum += of(thread, set)[column];
    return sum;
  }

  int64_t threads, sets, width;
  std::vector<Number> values;
};

// Sixteen numbers side by side, in as many registers as the processor needs for them.
typedef float Lanes __attribute__((vector_size(64)));
constexpr int64_t kLanes = 16;

// The sums over the columns of R rows at once, since one chain of additions would wait for each before the next.
template <int R>
struct RowSums {
  void add(int r, const Lanes& value) { lanes[r] += value; }
  void add(int r, float value) { rest[r] += value; }
  float total(int r) const {
    float sum = rest[r];
    for (int64_t lane = 0; lane < kLanes; ++lane) sum += lanes[r][lane];
    return sum;
  }

  Lanes lanes[R] = {};
  float rest[R] = {};
};

inline void add_to(double* to, const Lanes& value) {
#pragma omp simd
  for (int64_t lane = 0; lane < kLanes; ++lane) to[lane] += value[lane];
}
inline void add_to(double* to, float value) { *to += value; }

// Calls work(i, at, none) for the columns, lanes at a time and the last ones singly; at(p) reads the lanes or the number
// at p, and none is their zero.
template <typename Work>
inline void over_columns(int64_t size, Work work) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes)
    work(
        i,
        [](const float* from) {
          Lanes read;
          std::memcpy(&read, from, sizeof read);
          return read;
        },
        Lanes{});
  for (; i < size; ++i) work(i, [](const float* from) { return *from; }, 0.0f);
}

// Mean and biased variance of each column: of eight rows in registers, as by the definition, then merged by the law of
// total variance, so that columns far from zero lose nothing. Where row_mean is given, while the rows are at hand also
// their means and inverse deviations.
void column_moments(const float* x, float* mean, float* var, float* row_mean, float* row_inverse, float row_eps,
                    int64_t rows, int64_t width, int32_t threads) {
  Columns<double> sums(threads, 2, width);
  std::vector<int64_t> seen(threads, 0);
  in_blocks(rows, threads, [&](int64_t row, auto at_once, int64_t thread) {
    constexpr int R = decltype(at_once)::value;
    const int64_t size = width;
    const float* from = x + row * size;
    double *centre = sums.of(thread, 0), *spread = sums.of(thread, 1);
    const double share = static_cast<double>(R) / (seen[thread] + R), cross = share * seen[thread];
    seen[thread] += R;
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      float sum = 0.0f, square = 0.0f;
      for (int r = 0; r < R; ++r) sum += from[r * size + i];
      const float middle = sum / R;
      for (int r = 0; r < R; ++r) square += (from[r * size + i] - middle) * (from[r * size + i] - middle);
      const double off = middle - centre[i];
      centre[i] += off * share;
      spread[i] += square + off * off * cross;
    }
    if (row_mean == nullptr) return;
    RowSums<R> values, squares;
    over_columns(size, [&](int64_t i, auto at, auto) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) values.add(r, at(from + r * size + i));
    });
    float middle[R];
    for (int r = 0; r < R; ++r) middle[r] = values.total(r) / size;
    over_columns(size, [&](int64_t i, auto at, auto) {
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto off = at(from + r * size + i) - middle[r];
        squares.add(r, off * off);
      }
    });
    for (int r = 0; r < R; ++r) {
      row_mean[row + r] = middle[r];
      row_inverse[row + r] = 1.0f / std::sqrt(squares.total(r) / size + row_eps);
    }
  });
  for (int64_t i = 0; i < width; ++i) {
    double centre = 0.0, spread = 0.0;
    int64_t count = 0;
    for (int32_t thread = 0; thread < threads; ++thread) {
      if (seen[thread] == 0) continue;
      count += seen[thread];
      const double off = sums.of(thread, 0)[i] - centre, share = static_cast<double>(seen[thread]) / count;
      centre += off * share;
      spread += sums.of(thread, 1)[i] + off * off * share * (count - seen[thread]);
    }
    mean[i] = static_cast<float>(centre);
    var[i] = static_cast<float>(spread / rows);
  }
}

enum Kind : int32_t { affine = 0, larger = 1, gated = 2, silu = 3 };

}  // namespace

extern "C" {

// Mean and biased variance of each row.
void torchgraft_row_moments(const float* x, float* mean, float* var, int64_t rows, int64_t size, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * size;
    float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < size; ++i) sum += from[i];
    const float centre = sum / size;
    float square = 0.0f;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < size; ++i) {
      const float off = from[i] - centre;
      square += off * off;
    }
    mean[row] = centre;
    var[row] = square / size;
  }
}

// y of each row from x and its numbers, numbers[k * rows + row].
void torchgraft_rows_forward(int32_t kind, const float* x, const float* numbers, float* y, int64_t rows, int64_t size,
                             int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * size;
    float* to = y + row * size;
    const float a = numbers[row], b = numbers[rows + row];
    if (kind == affine) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) to[i] = from[i] * a + b;
    } else if (kind == silu) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) to[i] = from[i] * sigmoid(from[i]) * a + b;
    } else if (kind == gated) {  // v, scale, shift
      const float shift = numbers[2 * rows + row];
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) to[i] = from[i] * sigmoid(a * from[i]) * b + shift;
    } else {  // s, p, q, gain, offset
      const float q = numbers[2 * rows + row], gain = numbers[3 * rows + row], offset = numbers[4 * rows + row];
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float other = from[i] * b + q;
        to[i] = from[i] / (other > a ? other : a) * gain + offset;
      }
    }
  }
}

// The gradient of every number of each row, sums[k * rows + row].
void torchgraft_rows_sums(int32_t kind, const float* x, const float* grad, const float* numbers, float* sums,
                          int64_t rows, int64_t size, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float *from = x + row * size, *above = grad + row * size;
    const float a = numbers[row], b = numbers[rows + row];
    float first = 0.0f, second = 0.0f, third = 0.0f, fourth = 0.0f, fifth = 0.0f;
    if (kind == affine) {
#pragma omp simd reduction(+ : first, second)
      for (int64_t i = 0; i < size; ++i) {
        first += above[i] * from[i];
        second += above[i];
      }
    } else if (kind == silu) {
#pragma omp simd reduction(+ : first, second)
      for (int64_t i = 0; i < size; ++i) {
        first += above[i] * (from[i] * sigmoid(from[i]));
        second += above[i];
      }
    } else if (kind == gated) {
#pragma omp simd reduction(+ : first, second, third)
      for (int64_t i = 0; i < size; ++i) {
        const float gate = sigmoid(a * from[i]), through = from[i] * gate;
        first += above[i] * b * through * (1.0f - gate) * from[i];
        second += above[i] * through;
        third += above[i];
      }
    } else {
      const float q = numbers[2 * rows + row], gain = numbers[3 * rows + row];
#pragma omp simd reduction(+ : first, second, third, fourth, fifth)
      for (int64_t i = 0; i < size; ++i) {
        const float other = from[i] * b + q;
        const bool taken = other > a;
        const float inverse = 1.0f / (taken ? other : a);
        const float ratio = from[i] * inverse;
        const float down = -(above[i] * gain * inverse) * ratio;
        const float into = taken ? down : 0.0f;
        first += down - into;
        second += into * from[i];
        third += into;
        fourth += above[i] * ratio;
        fifth += above[i];
      }
    }
    sums[row] = first;
    sums[rows + row] = second;
    if (kind == gated || kind == larger) sums[2 * rows + row] = third;
    if (kind == larger) {
      sums[3 * rows + row] = fourth;
      sums[4 * rows + row] = fifth;
    }
  }
}

// The gradient of x: through the kernel with its numbers held, plus slope x + offset through the moments.
void torchgraft_rows_backward(int32_t kind, const float* x, const float* grad, const float* numbers, const float* slope,
                              const float* offset, float* dx, int64_t rows, int64_t size, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float *from = x + row * size, *above = grad + row * size;
    float* to = dx + row * size;
    const float a = numbers[row], b = numbers[rows + row], m = slope[row], c = offset[row];
    if (kind == affine) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) to[i] = above[i] * a + (from[i] * m + c);
    } else if (kind == silu) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float gate = sigmoid(from[i]);
        to[i] = above[i] * a * (gate + from[i] * gate * (1.0f - gate)) + (from[i] * m + c);
      }
    } else if (kind == gated) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float gate = sigmoid(a * from[i]);
        to[i] = above[i] * b * (gate + a * from[i] * gate * (1.0f - gate)) + (from[i] * m + c);
      }
    } else {
      const float q = numbers[2 * rows + row], gain = numbers[3 * rows + row];
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float other = from[i] * b + q;
        const bool taken = other > a;
        const float inverse = 1.0f / (taken ? other : a);
        const float push = above[i] * gain * inverse;
        to[i] = push - (taken ? push * from[i] * inverse * b : 0.0f) + (from[i] * m + c);
      }
    }
  }
}

// PowerNorm by running numbers: scale of each token and group (rows x groups; groups 0 for none), the weighted sum of
// squares of every column, and y = x scale factor + shift.
void torchgraft_power_forward(const float* x, const float* weight, const float* factor, const float* shift,
                              float* scale, float* total, float* y, int64_t rows, int64_t width, int64_t groups, float eps,
                              int32_t threads) {
  Columns<float> sums(threads, 1, width);
  each_row(y, rows, width, threads, [&](int64_t row, float* to, int64_t thread) {
    const int64_t parts = std::max<int64_t>(groups, 1), size = width / parts;
    const float by = weight == nullptr ? 1.0f : weight[row];
    for (int64_t part = 0, start = 0; part < parts; ++part, start += size) {
      const float *from = x + row * width + start, *f = factor + start, *s = shift + start;
      float inverse = 1.0f;
      if (groups > 0) {
        float square = 0.0f;
#pragma omp simd reduction(+ : square)
        for (int64_t i = 0; i < size; ++i) square += from[i] * from[i];
        inverse = 1.0f / std::sqrt(square / size + eps);
        scale[row * groups + part] = inverse;
      }
      float *into = sums.of(thread, 0) + start, *out = to + start;
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        const float piece = from[i] * inverse;
        into[i] += by * piece * piece;
        out[i] = piece * f[i] + s[i];
      }
    }
  });
  for (int64_t i = 0; i < width; ++i) total[i] = static_cast<float>(sums.total(0, i));
}

// dx = grad push - x pull, through the scaling of tokens; along and upward are the column sums of grad x and of grad.
void torchgraft_power_backward(const float* grad, const float* x, const float* scale, const float* push,
                               const float* pull, float* dx, float* along, float* upward, int64_t rows, int64_t width,
                               int64_t groups, int32_t threads) {
  Columns<float> sums(threads, 2, width);
  each_row(dx, rows, width, threads, [&](int64_t row, float* to, int64_t thread) {
    const int64_t parts = std::max<int64_t>(groups, 1), size = width / parts;
    for (int64_t part = 0, start = 0; part < parts; ++part, start += size) {
      const float *from = x + row * width + start, *above = grad + row * width + start;
      const float *p = push + start, *l = pull + start;
      float *out = to + start, *one = sums.of(thread, 0) + start, *two = sums.of(thread, 1) + start;
      const float inverse = groups > 0 ? scale[row * groups + part] : 1.0f;
      float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
      for (int64_t i = 0; i < size; ++i) {
        const float piece = from[i] * inverse, into = above[i] * p[i] - piece * l[i];
        one[i] += above[i] * piece;
        two[i] += above[i];
        mean += into * piece;
        out[i] = into;
      }
      if (groups > 0) {
        mean /= size;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) out[i] = (out[i] - from[i] * inverse * mean) * inverse;
      }
    }
  });
  for (int64_t i = 0; i < width; ++i) {
    along[i] = static_cast<float>(sums.total(0, i));
    upward[i] = static_cast<float>(sums.total(1, i));
  }
}

// The batch norm of columns with x added, z = gain (x - mean) / deviation + offset + eta x, and a layer norm of each
// row r beside it: y = lam ((x - mean_r) inverse_r weight + bias) + (1 - lam) z. Without weight, lam is 0 and no row is
// looked at. Returned besides y: mean_r and inverse_r (rows each), mean and variance of the columns (width each).
void torchgraft_blend_forward(const float* x, const float* weight, const float* bias, const float* gain,
                              const float* offset, const float* eta, float* row_mean, float* row_inverse, float* mean,
                              float* var, float* y, int64_t rows, int64_t width, float lam, float row_eps, float eps,
                              int32_t threads) {
  column_moments(x, mean, var, weight == nullptr ? nullptr : row_mean, row_inverse, row_eps, rows, width, threads);
  std::vector<float> factors(width), shifts(width);
  const float rest = 1.0f - lam;
  for (int64_t i = 0; i < width; ++i) {
    const float scale = gain[i] / std::sqrt(var[i] + eps);
    factors[i] = rest * (scale + *eta);
    shifts[i] = rest * (offset[i] - mean[i] * scale) + (weight == nullptr ? 0.0f : lam * bias[i]);
  }
  each_row(y, rows, width, threads, [&](int64_t row, float* to, int64_t) {
    const int64_t size = width;
    const float *from = x + row * size, *factor = factors.data(), *shift = shifts.data(), *w = weight;
    if (w == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) to[i] = from[i] * factor[i] + shift[i];
      return;
    }
    const float centre = row_mean[row], scale = lam * row_inverse[row];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i)
      to[i] = (from[i] - centre) * scale * w[i] + (from[i] * factor[i] + shift[i]);
  });
}

// The gradients of everything that goes into blend_forward, from what came out of it. Column sums first, of grad, of
// grad (x - mean) and of grad (x - mean_r) inverse_r, with the means of grad weight and of grad weight (x - mean_r)
// inverse_r in each row; then dx in a second pass.
void torchgraft_blend_backward(const float* grad, const float* x, const float* weight, const float* gain,
                               const float* eta, const float* row_mean, const float* row_inverse, const float* mean,
                               const float* var, float* dx, float* to_weight, float* to_bias, float* to_gain,
                               float* to_offset, float* to_eta, int64_t rows, int64_t width, float lam, float eps,
                               int32_t threads) {
  Columns<double> sums(threads, 3, width);
  std::vector<float> firsts(rows), seconds(rows);
  in_blocks(rows, threads, [&](int64_t row, auto at_once, int64_t thread) {
    constexpr int R = decltype(at_once)::value;
    const int64_t size = width;
    const float *from = x + row * size, *above = grad + row * size, *w = weight, *middle = mean;
    double *one = sums.of(thread, 0), *two = sums.of(thread, 1), *three = sums.of(thread, 2);
    if (w == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) {
        float a = 0.0f, b = 0.0f;
        for (int r = 0; r < R; ++r) {
          a += above[r * size + i];
          b += above[r * size + i] * (from[r * size + i] - middle[i]);
        }
        one[i] += a;
        two[i] += b;
      }
      return;
    }
    const float *centre = row_mean + row, *inverse = row_inverse + row;
    RowSums<R> pushed, turned;
    over_columns(size, [&](int64_t i, auto at, auto none) {
      auto a = none, b = none, c = none;
      const auto gain_of = at(w + i), off = at(middle + i);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const auto g = at(above + r * size + i), value = at(from + r * size + i);
        const auto along = g * ((value - centre[r]) * inverse[r]);
        a += g;
        b += g * (value - off);
        c += along;
        pushed.add(r, g * gain_of);
        turned.add(r, along * gain_of);
      }
      add_to(one + i, a);
      add_to(two + i, b);
      add_to(three + i, c);
    });
    for (int r = 0; r < R; ++r) {
      firsts[row + r] = pushed.total(r) / size;
      seconds[row + r] = turned.total(r) / size;
    }
  });
  std::vector<float> pushes(width), pulls(width), adds(width);
  double along_x = 0.0;
  const double rest = 1.0 - lam;
  for (int64_t i = 0; i < width; ++i) {
    const double upward = sums.total(0, i), along = sums.total(1, i);
    const double inverse = 1.0 / std::sqrt(static_cast<double>(var[i]) + eps), scale = gain[i] * inverse;
    const double pull = -rest / rows * scale * inverse * inverse * along;
    pushes[i] = static_cast<float>(rest * (scale + *eta));
    pulls[i] = static_cast<float>(pull);
    adds[i] = static_cast<float>(-rest / rows * scale * upward - pull * mean[i]);
    to_gain[i] = static_cast<float>(rest * along * inverse);
    to_offset[i] = static_cast<float>(rest * upward);
    along_x += along + mean[i] * upward;
    if (weight != nullptr) {
      to_weight[i] = static_cast<float>(lam * sums.total(2, i));
      to_bias[i] = static_cast<float>(lam * upward);
    }
  }
  *to_eta = static_cast<float>(rest * along_x);
  each_row(dx, rows, width, threads, [&](int64_t row, float* to, int64_t) {
    const int64_t size = width;
    const float *from = x + row * size, *above = grad + row * size, *w = weight;
    const float *push = pushes.data(), *pull = pulls.data(), *add = adds.data();
    if (w == nullptr) {
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) to[i] = above[i] * push[i] + from[i] * pull[i] + add[i];
      return;
    }
    const float centre = row_mean[row], scale = lam * row_inverse[row];
    const float first = firsts[row], second = seconds[row] * row_inverse[row];
#pragma omp simd
    for (int64_t i = 0; i < size; ++i) {
      const float token = above[i] * w[i] - first - (from[i] - centre) * second;
      to[i] = scale * token + (above[i] * push[i] + from[i] * pull[i] + add[i]);
    }
  });
}
}
