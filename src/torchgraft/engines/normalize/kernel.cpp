// Passes of normalisation layers over float32 rows, compiled for the processor at hand; see native.py beside this file.
//
// Rows are contiguous. Sums of a row are taken in the lanes of vectors; column sums are kept for each thread and added in
// the order of the threads, so that the same number of threads gives the same sums.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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
void torchgraft_power_forward(const float* x, const float* weight, const float* factor, const float* shift, float* scale,
                              float* total, float* y, int64_t rows, int64_t width, int64_t groups, float eps,
                              int32_t threads) {
  std::vector<float> sums(static_cast<size_t>(threads) * width, 0.0f);
  const int64_t parts = std::max<int64_t>(groups, 1), size = width / parts;
#pragma omp parallel num_threads(threads)
  {
    float* mine = sums.data() + static_cast<size_t>(omp_get_thread_num()) * width;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const float by = weight == nullptr ? 1.0f : weight[row];
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t start = part * size;
        const float* from = x + row * width + start;
        float inverse = 1.0f;
        if (groups > 0) {
          float square = 0.0f;
#pragma omp simd reduction(+ : square)
          for (int64_t i = 0; i < size; ++i) square += from[i] * from[i];
          inverse = 1.0f / std::sqrt(square / size + eps);
          scale[row * groups + part] = inverse;
        }
        float* to = y + row * width + start;
        float* into = mine + start;
        const float *f = factor + start, *s = shift + start;
#pragma omp simd
        for (int64_t i = 0; i < size; ++i) {
          const float piece = from[i] * inverse;
          into[i] += by * piece * piece;
          to[i] = piece * f[i] + s[i];
        }
      }
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    float sum = 0.0f;
    for (int32_t thread = 0; thread < threads; ++thread) sum += sums[static_cast<size_t>(thread) * width + i];
    total[i] = sum;
  }
}

// dx = grad push - x pull, through the scaling of tokens; along and upward are the column sums of grad x and of grad.
void torchgraft_power_backward(const float* grad, const float* x, const float* scale, const float* push,
                               const float* pull, float* dx, float* along, float* upward, int64_t rows, int64_t width,
                               int64_t groups, int32_t threads) {
  std::vector<float> sums(static_cast<size_t>(threads) * width * 2, 0.0f);
  const int64_t parts = std::max<int64_t>(groups, 1), size = width / parts;
#pragma omp parallel num_threads(threads)
  {
    float* first = sums.data() + static_cast<size_t>(omp_get_thread_num()) * width * 2;
    float* second = first + width;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t part = 0; part < parts; ++part) {
        const int64_t start = part * size;
        const float *from = x + row * width + start, *above = grad + row * width + start;
        const float *p = push + start, *l = pull + start;
        float *to = dx + row * width + start, *one = first + start, *two = second + start;
        const float inverse = groups > 0 ? scale[row * groups + part] : 1.0f;
        float mean = 0.0f;
#pragma omp simd reduction(+ : mean)
        for (int64_t i = 0; i < size; ++i) {
          const float piece = from[i] * inverse;
          one[i] += above[i] * piece;
          two[i] += above[i];
          const float into = above[i] * p[i] - piece * l[i];
          mean += into * piece;
          to[i] = into;
        }
        if (groups > 0) {
          mean /= size;
#pragma omp simd
          for (int64_t i = 0; i < size; ++i) to[i] = (to[i] - from[i] * inverse * mean) * inverse;
        }
      }
    }
  }
  for (int64_t i = 0; i < width; ++i) {
    float sum = 0.0f, other = 0.0f;
    for (int32_t thread = 0; thread < threads; ++thread) {
      sum += sums[static_cast<size_t>(thread) * width * 2 + i];
      other += sums[static_cast<size_t>(thread) * width * 2 + width + i];
    }
    along[i] = sum;
    upward[i] = other;
  }
}

// Two norms of tokens at once: y = lam ((x - mean_r) inverse_r weight + bias) + (1 - lam) (x factor + shift), with the mean
// and the inverse deviation of each row r, which are returned, and the others a number a column.
void torchgraft_blend_forward(const float* x, const float* weight, const float* bias, const float* factor,
                              const float* shift, float* mean, float* inverse, float* y, int64_t rows, int64_t width,
                              float lam, float eps, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float* from = x + row * width;
    float* to = y + row * width;
    float sum = 0.0f, square = 0.0f;
#pragma omp simd reduction(+ : sum)
    for (int64_t i = 0; i < width; ++i) sum += from[i];
    const float centre = sum / width;
#pragma omp simd reduction(+ : square)
    for (int64_t i = 0; i < width; ++i) square += (from[i] - centre) * (from[i] - centre);
    const float over = 1.0f / std::sqrt(square / width + eps);
    mean[row] = centre;
    inverse[row] = over;
    const float rest = 1.0f - lam;
#pragma omp simd
    for (int64_t i = 0; i < width; ++i)
      to[i] = lam * ((from[i] - centre) * over * weight[i] + bias[i]) + rest * (from[i] * factor[i] + shift[i]);
  }
}

// Column sums of grad, grad (x - centre) and grad (x - mean_r) inverse_r, and of each row the means of grad weight and
// of grad weight (x - mean_r) inverse_r.
void torchgraft_blend_sums(const float* grad, const float* x, const float* weight, const float* mean,
                           const float* inverse, const float* middle, float* upward, float* along, float* across, float* first,
                           float* second, int64_t rows, int64_t width, int32_t threads) {
  std::vector<float> sums(static_cast<size_t>(threads) * width * 3, 0.0f);
#pragma omp parallel num_threads(threads)
  {
    float* one = sums.data() + static_cast<size_t>(omp_get_thread_num()) * width * 3;
    float *two = one + width, *three = two + width;
#pragma omp for schedule(static)
    for (int64_t row = 0; row < rows; ++row) {
      const float *from = x + row * width, *above = grad + row * width;
      const float centre = mean[row], over = inverse[row];
      float a = 0.0f, b = 0.0f;
#pragma omp simd reduction(+ : a, b)
      for (int64_t i = 0; i < width; ++i) {
        const float unit = (from[i] - centre) * over, through = above[i] * weight[i];
        one[i] += above[i];
        two[i] += above[i] * (from[i] - middle[i]);
        three[i] += above[i] * unit;
        a += through;
        b += through * unit;
      }
      first[row] = a / width;
      second[row] = b / width;
    }
  }
  float* to[3] = {upward, along, across};
  for (int64_t which = 0; which < 3; ++which)
    for (int64_t i = 0; i < width; ++i) {
      float sum = 0.0f;
      for (int32_t thread = 0; thread < threads; ++thread)
        sum += sums[(static_cast<size_t>(thread) * 3 + which) * width + i];
      to[which][i] = sum;
    }
}

// dx = lam inverse_r (grad weight - first_r - unit second_r) + grad push + x pull + add.
void torchgraft_blend_backward(const float* grad, const float* x, const float* weight, const float* mean,
                               const float* inverse, const float* first, const float* second, const float* push,
                               const float* pull, const float* add, float* dx, int64_t rows, int64_t width, float lam,
                               int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    const float *from = x + row * width, *above = grad + row * width;
    float* to = dx + row * width;
    const float centre = mean[row], over = inverse[row], a = first[row], b = second[row];
#pragma omp simd
    for (int64_t i = 0; i < width; ++i) {
      const float unit = (from[i] - centre) * over;
      to[i] = lam * over * (above[i] * weight[i] - a - unit * b) + (above[i] * push[i] + from[i] * pull[i] + add[i]);
    }
  }
}
}
