// Functions of elements and rows, shared by the loops. Every file that includes this one is compiled once for each set
// of vector instructions, so the functions are in an unnamed namespace.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

namespace nmt_moe {
namespace {

template <typename T>
inline T madd(T a, T b, T c) {
#ifdef __FMA__
  return std::fma(a, b, c);
#else
  return a * b + c;
#endif
}

// Computes e^x for x <= 0, to within 2 units in the last place. Below x = -87, where e^x nears the smallest normal
// number, the result is 0.
inline float exp_negative(float x) {
  const float lowest = -87.0f;
  const float bounded = x < lowest ? lowest : x;  // keeps NaN
  const float shift = 12582912.0f;                // 1.5 * 2^23: adding it leaves a rounded integer in the last bits
  const float shifted = madd(bounded, 1.44269504f, shift);
  const float power = shifted - shift;
  const float rest = madd(power, -1.42860677e-6f, madd(power, -0.693145752f, bounded));  // ln 2 in two parts
  // A minimax fit of (e^r - 1 - r) / r^2 for |r| <= ln 2 / 2; the relative error of e^r is below 4e-9.
  float p = 0.0013813142f;
  p = madd(p, rest, 0.008369419f);
  p = madd(p, rest, 0.041668456f);
  p = madd(p, rest, 0.16666515f);
  p = madd(p, rest, 0.49999994f);
  p = madd(p * rest, rest, rest) + 1.0f;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  const uint32_t scale_bits = (bits << 23) + 0x3f800000u;  // 2^power; the bits of `shift` itself are shifted out
  float scale;
  std::memcpy(&scale, &scale_bits, sizeof scale);
  return x < lowest ? 0.0f : p * scale;
}

inline double exp_negative(double x) { return std::exp(x); }

// A quotient that has not been divided yet, so that several quotients can share one division. The denominators are from
// 1 to 2, so that their products cannot overflow.
template <typename T>
struct Quotient {
  T numerator, denominator;
};

template <typename T>
inline Quotient<T> sigmoid(T x) {
  const T small = exp_negative(-std::fabs(x));
  return {x < T(0) ? small : T(1), T(1) + small};
}

// Computes |tanh(x)|.
template <typename T>
inline Quotient<T> hyperbolic_tangent(T x) {
  const T small = exp_negative(T(-2) * std::fabs(x));
  return {T(1) - small, T(1) + small};
}

// Computes tanh(x) from the quotient for |tanh(x)|. For |x| < 0.55, where the quotient would lose digits, a minimax fit
// of (tanh(x) / x - 1) / x^2 is used instead.
inline float finish_tangent(float x, float quotient) {
  const float z = x * x;
  float p = -0.006282467f;
  p = madd(p, z, 0.021077754f);
  p = madd(p, z, -0.05385386f);
  p = madd(p, z, 0.13332602f);
  p = madd(p, z, -0.3333332f);
  return std::fabs(x) < 0.55f ? madd(p * z, x, x) : std::copysign(quotient, x);
}

inline double finish_tangent(double x, double) { return std::tanh(x); }

template <typename T>
inline T tangent(T x) {
  const Quotient<T> parts = hyperbolic_tangent(x);
  return finish_tangent(x, parts.numerator / parts.denominator);
}

// Sums are computed in this many parts, whatever the length of the processor's vectors.
constexpr int64_t PARTS = 32;

template <typename T>
inline T join(T* parts) {
  for (int64_t half = PARTS / 2; half > 0; half /= 2) {
    for (int64_t at = 0; at < half; ++at) parts[at] += parts[at + half];
  }
  return parts[0];
}

template <typename T>
inline T dot(const T* __restrict left, const T* __restrict right, int64_t width) {
  T parts[PARTS] = {};
  int64_t start = 0;
  for (; start + PARTS <= width; start += PARTS) {
    for (int64_t at = 0; at < PARTS; ++at) parts[at] = madd(left[start + at], right[start + at], parts[at]);
  }
  for (int64_t at = 0; start + at < width; ++at) parts[at] = madd(left[start + at], right[start + at], parts[at]);
  return join(parts);
}

// Computes out, the sum over positions of weights[position] * rows[position].
template <typename T>
inline void mix(const T* __restrict weights, const T* __restrict rows, T* __restrict out, int64_t length,
                int64_t width) {
  std::fill(out, out + width, T(0));
  for (int64_t position = 0; position < length; ++position) {
    const T weight = weights[position];
    const T* __restrict row = rows + position * width;
    for (int64_t at = 0; at < width; ++at) out[at] = madd(weight, row[at], out[at]);
  }
}

// Turns scores into weights, given the largest score, and computes the context.
template <typename T>
inline void weigh(T* __restrict weights, const bool* padding, T largest, const T* __restrict source,
                  T* __restrict context, int64_t length, int64_t width) {
  T sum = 0;
  for (int64_t position = 0; position < length; ++position) {
    weights[position] = padding[position] ? T(0) : exp_negative(weights[position] - largest);
    sum += weights[position];
  }
  for (int64_t position = 0; position < length; ++position) weights[position] /= sum;
  mix(weights, source, context, length, width);
}

}  // namespace
}  // namespace nmt_moe
