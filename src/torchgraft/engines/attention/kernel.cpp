// log(1 + e^s) over float32 scores and the sums of its rows in one pass, compiled for the processor at hand; see
// stages.py beside this file.

#include <cstdint>
#include <cstring>

namespace {

// e^x for -87 <= x <= 0, to about 2 ulp; NaN stays.
inline float exponential(float x) {
  const float turns = x * 1.44269504088896341f;
  const float whole = turns + 12582912.0f - 12582912.0f;  // to the nearest whole number
  float rest = x - whole * 0.693359375f;
  rest = rest + whole * 2.12194440e-4f;
  float sum = 1.9875691500e-4f;
  sum = sum * rest + 1.3981999507e-3f;
  sum = sum * rest + 8.3334519073e-3f;
  sum = sum * rest + 4.1665795894e-2f;
  sum = sum * rest + 1.6666665459e-1f;
  sum = sum * rest + 5.0000001201e-1f;
  sum = sum * rest * rest + rest + 1.0f;
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// log(1 + u) for 0 <= u <= 1: u times the polynomial whose largest relative error there is least, 3e-8; with rounding
// 2e-7. There is no division, which takes as long as all of this.
inline float logarithm(float u) {
  float sum = 5.23269363e-3f;
  sum = sum * u - 2.95052398e-2f;
  sum = sum * u + 7.82259628e-2f;
  sum = sum * u - 1.36632472e-1f;
  sum = sum * u + 1.91060081e-1f;
  sum = sum * u - 2.48429820e-1f;
  sum = sum * u + 3.33190978e-1f;
  sum = sum * u - 4.99994934e-1f;
  sum = sum * u + 9.99999940e-1f;
  return sum * u;
}

}  // namespace

// Writes log(1 + e^s) over the scores, 0 below -87 and so for minus infinity, and the sum of each row into sums, unless
// that is null.
extern "C" void torchgraft_softplus(float* s, float* sums, int64_t rows, int64_t size, int32_t threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t row = 0; row < rows; ++row) {
    float* values = s + row * size;
    float total = 0.0f;
#pragma omp simd reduction(+ : total)
    for (int64_t i = 0; i < size; ++i) {
      const float x = values[i], below = x > 0.0f ? -x : x;
      const float small = below < -87.0f ? 0.0f : logarithm(exponential(below < -87.0f ? -87.0f : below));
      const float value = (x > 0.0f ? x : 0.0f) + small;
      values[i] = value;
      total += value;
    }
    if (sums != nullptr) sums[row] = total;
  }
}
