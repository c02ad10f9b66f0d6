// These loops are written for the compiler to vectorise; see loops.cpp.
#include "inference_loops.h"

#include <limits>

#include "functions.h"

namespace nmt_moe {
namespace {

void attend_additively(const float* __restrict query, const float* __restrict scale, const float* __restrict keys,
                       const float* __restrict source, const bool* padding, float* __restrict weights,
                       float* __restrict context, int64_t length, int64_t width) {
  float largest = -std::numeric_limits<float>::infinity();
  for (int64_t position = 0; position < length; ++position) {
    if (padding[position]) continue;
    const float* __restrict key = keys + position * width;
    float parts[PARTS] = {};
    int64_t start = 0;
    for (; start + PARTS <= width; start += PARTS) {
      for (int64_t at = 0; at < PARTS; ++at) {
        parts[at] = madd(scale[start + at], tangent(query[start + at] + key[start + at]), parts[at]);
      }
    }
    for (int64_t at = 0; start + at < width; ++at) {
      parts[at] = madd(scale[start + at], tangent(query[start + at] + key[start + at]), parts[at]);
    }
    weights[position] = join(parts);
    largest = std::max(weights[position], largest);  // may miss NaN, which the sum keeps
  }
  weigh(weights, padding, largest, source, context, length, width);
}

void add_scaled(const float* __restrict row, float factor, float* __restrict sum, int64_t width) {
  for (int64_t at = 0; at < width; ++at) sum[at] += factor * row[at];
}

void relu(float* values, int64_t width) {
  for (int64_t at = 0; at < width; ++at) values[at] = values[at] < 0.0f ? 0.0f : values[at];  // keeps NaN
}

void sigmoid_residual(float* __restrict values, const float* __restrict residual, int64_t width) {
  for (int64_t at = 0; at < width; ++at) {
    const Quotient<float> parts = sigmoid(values[at]);
    values[at] = parts.numerator / parts.denominator + residual[at];
  }
}

void tangents(float* values, int64_t width) {
  for (int64_t at = 0; at < width; ++at) values[at] = tangent(values[at]);
}

void log_softmax(float* __restrict logits, int64_t width) {
  float peaks[PARTS], sums[PARTS] = {};
  std::fill(peaks, peaks + PARTS, logits[0]);
  const int64_t whole = width - width % PARTS;
  for (int64_t start = 0; start < whole; start += PARTS) {
    for (int64_t at = 0; at < PARTS; ++at) {
      peaks[at] = logits[start + at] > peaks[at] ? logits[start + at] : peaks[at];
    }
  }
  float largest = *std::max_element(peaks, peaks + PARTS);
  for (int64_t at = whole; at < width; ++at) largest = logits[at] > largest ? logits[at] : largest;
  for (int64_t start = 0; start < whole; start += PARTS) {
    for (int64_t at = 0; at < PARTS; ++at) sums[at] += exp_negative(logits[start + at] - largest);
  }
  for (int64_t at = whole; at < width; ++at) sums[at - whole] += exp_negative(logits[at] - largest);
  const float log_sum = std::log(join(sums));
  for (int64_t at = 0; at < width; ++at) logits[at] = logits[at] - largest - log_sum;
}

inline bool is_larger(float value, float other) { return value > other || (std::isnan(value) && !std::isnan(other)); }

void find_largest(const float* __restrict values, int64_t width, int64_t count, float* __restrict found,
                  int64_t* __restrict positions) {
  int64_t have = 0;
  for (int64_t start = 0; start < width; start += PARTS) {
    const int64_t stop = std::min(start + PARTS, width);
    if (have == count && stop - start == PARTS) {
      // Most blocks contain no value that is larger than the smallest one found so far.
      const float least = found[count - 1];
      int is_needed = 0;
      for (int64_t at = 0; at < PARTS; ++at) is_needed |= !(values[start + at] <= least);
      if (!is_needed) continue;
    }
    for (int64_t at = start; at < stop; ++at) {
      const float value = values[at];
      if (have == count && !is_larger(value, found[count - 1])) continue;
      int64_t place = have < count ? have++ : count - 1;
      for (; place > 0 && is_larger(value, found[place - 1]); --place) {
        found[place] = found[place - 1];
        positions[place] = positions[place - 1];
      }
      found[place] = value;
      positions[place] = at;
    }
  }
}

}  // namespace

#define JOIN_(left, right) left##right
#define JOIN(left, right) JOIN_(left, right)
MultiplyPanels JOIN(NMT_MOE_LEVEL, _multiply_panels);
PackPanels JOIN(NMT_MOE_LEVEL, _pack_panels);
Transpose JOIN(NMT_MOE_LEVEL, _transpose);

const InferenceLoops& JOIN(NMT_MOE_LEVEL, _inference)() {
  static constexpr InferenceLoops loops{JOIN(NMT_MOE_LEVEL, _multiply_panels), JOIN(NMT_MOE_LEVEL, _pack_panels),
                                        JOIN(NMT_MOE_LEVEL, _transpose), attend_additively, add_scaled, relu,
                                        sigmoid_residual, tangents, log_softmax, find_largest};
  return loops;
}

}  // namespace nmt_moe
