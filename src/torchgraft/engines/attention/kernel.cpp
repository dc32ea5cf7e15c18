// log(1 + e^s) over float32 scores in one pass, compiled for the processor at hand; see stages.py beside this file.

#include <cstdint>
#include <cstring>

namespace {

// e^x for x <= 0, to about 2 ulp down to e^-87, and e^-87 below; NaN stays.
inline float exponential(float x) {
  const float held = x < -87.0f ? -87.0f : x;
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
  const int32_t bits = (static_cast<int32_t>(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return sum * power;
}

// log(1 + u) for 0 <= u <= 1: twice the inverse hyperbolic tangent of u / (2 + u), which is at most 1/3.
inline float logarithm(float u) {
  const float z = u / (2.0f + u), q = z * z;
  float sum = 1.0f / 15.0f;
  sum = sum * q + 1.0f / 13.0f;
  sum = sum * q + 1.0f / 11.0f;
  sum = sum * q + 1.0f / 9.0f;
  sum = sum * q + 1.0f / 7.0f;
  sum = sum * q + 1.0f / 5.0f;
  sum = sum * q + 1.0f / 3.0f;
  return 2.0f * (z + z * q * sum);
}

}  // namespace

extern "C" void torchgraft_softplus(float* s, int64_t count, int32_t threads) {
#pragma omp parallel for simd num_threads(threads) schedule(static)
  for (int64_t i = 0; i < count; ++i) {
    const float x = s[i], size = x < 0.0f ? x : -x;
    s[i] = (x > 0.0f ? x : 0.0f) + logarithm(exponential(size));
  }
}
