// These loops are written for the compiler to vectorise. They avoid branches, and every multiply-add is spelt out, so
// that an element's bits do not depend on its position in a vector.
#include "loops.h"

#include <limits>

#include "functions.h"

namespace nmt_moe {
namespace {

template <typename T>
void lstm_forward(T* __restrict gates, const T* __restrict cell_before, T* __restrict cell, T* __restrict hidden,
                  int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    T* __restrict i = gates + row * 4 * width;
    T* __restrict f = i + width;
    T* __restrict g = f + width;
    T* __restrict o = g + width;
    for (int64_t at = 0; at < width; ++at) {
      const Quotient<T> i_parts = sigmoid(i[at]), f_parts = sigmoid(f[at]), o_parts = sigmoid(o[at]);
      const Quotient<T> g_parts = hyperbolic_tangent(g[at]);
      const T left = i_parts.denominator * f_parts.denominator, right = g_parts.denominator * o_parts.denominator;
      const T all = T(1) / (left * right), of_left = all * right, of_right = all * left;
      const T in = i_parts.numerator * (of_left * f_parts.denominator);
      const T forget = f_parts.numerator * (of_left * i_parts.denominator);
      const T candidate = finish_tangent(g[at], g_parts.numerator * (of_right * o_parts.denominator));
      const T out = o_parts.numerator * (of_right * g_parts.denominator);
      const T now = madd(forget, cell_before[row * width + at], in * candidate);
      i[at] = in, f[at] = forget, g[at] = candidate, o[at] = out;
      cell[row * width + at] = now;
      hidden[row * width + at] = out * tangent(now);
    }
  }
}

template <typename T>
void lstm_backward(const T* __restrict gates, const T* __restrict cell_before, const T* __restrict cell,
                   const T* __restrict grad_hidden, T* __restrict grad_cell, T* __restrict grad_gates, int64_t rows,
                   int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict i = gates + row * 4 * width;
    const T* __restrict f = i + width;
    const T* __restrict g = f + width;
    const T* __restrict o = g + width;
    T* __restrict grad_i = grad_gates + row * 4 * width;
    T* __restrict grad_f = grad_i + width;
    T* __restrict grad_g = grad_f + width;
    T* __restrict grad_o = grad_g + width;
    for (int64_t at = 0; at < width; ++at) {
      const int64_t here = row * width + at;
      const T in = i[at], forget = f[at], candidate = g[at], out = o[at], grad = grad_hidden[here];
      const T squashed = tangent(cell[here]);
      const T grad_now = madd(grad * out, T(1) - squashed * squashed, grad_cell[here]);
      grad_i[at] = grad_now * candidate * in * (T(1) - in);
      grad_f[at] = grad_now * cell_before[here] * forget * (T(1) - forget);
      grad_g[at] = grad_now * in * (T(1) - candidate * candidate);
      grad_o[at] = grad * squashed * out * (T(1) - out);
      grad_cell[here] = grad_now * forget;
    }
  }
}

template <typename T>
void attend(T* __restrict query, const T* __restrict scale, const T* __restrict keys, const T* __restrict source,
            const bool* padding, T* __restrict scaled, T* __restrict weights, T* __restrict context, int64_t length,
            int64_t width) {
  for (int64_t at = 0; at < width; ++at) {
    query[at] = tangent(query[at]);
    scaled[at] = query[at] * scale[at];
  }
  T largest = -std::numeric_limits<T>::infinity();
  for (int64_t position = 0; position < length; ++position) {
    weights[position] = dot(scaled, keys + position * width, width);
    if (!padding[position]) largest = std::max(weights[position], largest);  // may miss NaN, which the sum keeps
  }
  weigh(weights, padding, largest, source, context, length, width);
}

template <typename T>
void attend_backward(const T* __restrict squashed, const T* __restrict scale, const T* __restrict keys,
                     const T* __restrict source, const T* __restrict weights, const T* __restrict grad_context,
                     const T* __restrict grad_weights, T* __restrict grad_scores, T* __restrict grad_scaled,
                     T* __restrict grad_query, int64_t length, int64_t width) {
  T inner = 0;
  for (int64_t position = 0; position < length; ++position) {
    T grad = dot(grad_context, source + position * width, width);
    if (grad_weights != nullptr) grad += grad_weights[position];
    grad_scores[position] = grad;
    inner = madd(weights[position], grad, inner);
  }
  for (int64_t position = 0; position < length; ++position) {
    grad_scores[position] = weights[position] * (grad_scores[position] - inner);
  }
  mix(grad_scores, keys, grad_scaled, length, width);
  for (int64_t at = 0; at < width; ++at) {
    grad_query[at] = grad_scaled[at] * scale[at] * (T(1) - squashed[at] * squashed[at]);
  }
}

// Reads the weight once, in long runs, while the sums stay in the innermost cache. Each element's sum runs in the order
// of the `inner` index, independently of the other rows.
template <typename T>
void multiply_few(const T* __restrict rows, const T* __restrict weight, T* __restrict out, int64_t count,
                  int64_t inner, int64_t columns, int64_t width) {
  T sums[FEW_ROWS][COLUMN_BLOCK];
  for (int64_t row = 0; row < count; ++row) std::fill(sums[row], sums[row] + columns, T(0));
  int64_t start = 0;
  for (; start + 4 <= inner; start += 4) {
    const T* __restrict first = weight + start * width;
    const T* __restrict second = first + width;
    const T* __restrict third = second + width;
    const T* __restrict fourth = third + width;
    for (int64_t row = 0; row < count; ++row) {
      const T* x = rows + row * inner + start;
      const T a = x[0], b = x[1], c = x[2], d = x[3];
      T* __restrict own = sums[row];
      for (int64_t at = 0; at < columns; ++at) {
        own[at] = madd(d, fourth[at], madd(c, third[at], madd(b, second[at], madd(a, first[at], own[at]))));
      }
    }
  }
  for (; start < inner; ++start) {
    const T* __restrict first = weight + start * width;
    for (int64_t row = 0; row < count; ++row) {
      const T a = rows[row * inner + start];
      T* __restrict own = sums[row];
      for (int64_t at = 0; at < columns; ++at) own[at] = madd(a, first[at], own[at]);
    }
  }
  for (int64_t row = 0; row < count; ++row) std::copy(sums[row], sums[row] + columns, out + row * width);
}

// If a logit is NaN, the results are also NaN: the maximum may miss it, but the sums do not.
template <typename T>
void log_sum_exp(const T* __restrict logits, T* log_sum, T* sum, int64_t width) {
  T largest = logits[0];
  T peaks[PARTS], exponentials[PARTS] = {}, plain[PARTS] = {};
  std::fill(peaks, peaks + PARTS, largest);
  int64_t start = 0;
  for (; start + PARTS <= width; start += PARTS) {
    for (int64_t at = 0; at < PARTS; ++at) {
      peaks[at] = logits[start + at] > peaks[at] ? logits[start + at] : peaks[at];
    }
  }
  for (int64_t at = 0; start + at < width; ++at) {
    peaks[at] = logits[start + at] > peaks[at] ? logits[start + at] : peaks[at];
  }
  for (int64_t at = 0; at < PARTS; ++at) largest = peaks[at] > largest ? peaks[at] : largest;
  for (start = 0; start + PARTS <= width; start += PARTS) {
    for (int64_t at = 0; at < PARTS; ++at) {
      exponentials[at] += exp_negative(logits[start + at] - largest);
      plain[at] += logits[start + at];
    }
  }
  for (int64_t at = 0; start + at < width; ++at) {
    exponentials[at] += exp_negative(logits[start + at] - largest);
    plain[at] += logits[start + at];
  }
  *log_sum = largest + std::log(join(exponentials));
  *sum = join(plain);
}

template <typename T>
void softmax_gradient(const T* __restrict logits, T log_sum, T scale, T shift, T* __restrict grads, int64_t width) {
  for (int64_t at = 0; at < width; ++at) {
    // A rounding error may put a logit above log_sum. It then counts as equal to log_sum.
    const T below = logits[at] - log_sum;
    grads[at] = madd(scale, exp_negative(below > T(0) ? T(0) : below), shift);
  }
}

template <typename T>
void square_sums(const T* __restrict block, T* __restrict row_sums, T* __restrict column_sums, int64_t rows,
                 int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    const T* __restrict values = block + row * width;
    T parts[PARTS] = {};
    int64_t start = 0;
    for (; start + PARTS <= width; start += PARTS) {
      for (int64_t at = 0; at < PARTS; ++at) {
        const T square = values[start + at] * values[start + at];
        parts[at] += square;
        column_sums[start + at] += square;
      }
    }
    for (int64_t at = 0; start + at < width; ++at) {
      const T square = values[start + at] * values[start + at];
      parts[at] += square;
      column_sums[start + at] += square;
    }
    row_sums[row] = join(parts);
  }
}

template <typename T>
void factored_update(T* __restrict weight, const T* __restrict grad, const T* __restrict row_root,
                     const T* __restrict column_root, T step_size, T eps, T keep, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; ++row) {
    const T root = row_root[row];
    T* __restrict values = weight + row * width;
    const T* __restrict slopes = grad + row * width;
    for (int64_t at = 0; at < width; ++at) {
      const T move = step_size * slopes[at] / madd(root, column_root[at], eps);
      values[at] = madd(keep, values[at], -move);
    }
  }
}

template <typename T>
constexpr Loops<T> loops{
    lstm_forward<T>, lstm_backward<T>,    attend<T>,      attend_backward<T>,  multiply_few<T>,
    log_sum_exp<T>,  softmax_gradient<T>, square_sums<T>, factored_update<T>,
};

}  // namespace

#define JOIN_(left, right) left##right
#define JOIN(left, right) JOIN_(left, right)
const Loops<float>& JOIN(NMT_MOE_LEVEL, _float)() { return loops<float>; }
const Loops<double>& JOIN(NMT_MOE_LEVEL, _double)() { return loops<double>; }

}  // namespace nmt_moe
