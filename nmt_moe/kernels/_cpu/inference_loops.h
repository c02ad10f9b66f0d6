// Loops over plain memory in float32: products with panels, and loops that only inference needs. They are compiled once
// for each set of vector instructions.
#pragma once

#include <cstdint>

namespace nmt_moe {

// Weights (I, O) are stored in panels of this many columns: (ceil(O / PANEL), I, PANEL), padded with zeros.
constexpr int64_t PANEL = 16;

// A product out (rows, width) = addend + x (rows, inner) * weight, with the weight in panels. The strides are those of
// rows. The addend may be `out` itself, a single row (stride 0), or null for zeros.
struct PanelProduct {
  const float* x;
  int64_t x_stride;
  const float* panels;
  const float* addend;
  int64_t addend_stride;
  float* out;
  int64_t out_stride;
  int64_t inner, width;
};

// Computes the product for the first `rows` rows and the panels [first, last). Each element's sum runs in the order of
// the `inner` index, whatever the number of rows.
using MultiplyPanels = void(const PanelProduct& product, int64_t rows, int64_t first, int64_t last);

// Writes `columns` columns of a matrix as panels. Rows of the matrix are `row_stride` elements apart, and columns are
// `column_stride` elements apart. It is fastest if one of the strides is 1.
using PackPanels = void(const float* matrix, int64_t row_stride, int64_t column_stride, float* panels, int64_t inner,
                        int64_t columns);

// Computes to (rows, inner) = from^T, where the rows of `from` (inner, rows) are `stride` elements apart.
using Transpose = void(const float* from, int64_t stride, float* to, int64_t rows, int64_t inner);

struct InferenceLoops {
  MultiplyPanels* multiply_panels;
  PackPanels* pack_panels;
  Transpose* transpose;

  // Computes one step's additive attention for one query and a sentence of `length` positions with `width` elements
  // each. The weights of all positions (0 for padding) and the context are written.
  void (*attend_additively)(const float* query, const float* scale, const float* keys, const float* source,
                            const bool* padding, float* weights, float* context, int64_t length, int64_t width);

  // Adds a row, multiplied by `factor`, to a sum.
  void (*add_scaled)(const float* row, float factor, float* sum, int64_t width);

  // Replaces negative values with 0.
  void (*relu)(float* values, int64_t width);

  // Replaces values with their sigmoids and adds `residual`, or replaces them with their hyperbolic tangents.
  void (*sigmoid_residual)(float* values, const float* residual, int64_t width);
  void (*tanh)(float* values, int64_t width);

  // Replaces a row of logits with log-probabilities.
  void (*log_softmax)(float* logits, int64_t width);

  // Finds the `count` largest of a row's values, with the largest first, and their positions. Of equal values, the
  // first ones are found; NaN counts as the largest.
  void (*find_largest)(const float* values, int64_t width, int64_t count, float* found, int64_t* positions);
};

// The loops of each level. Levels other than the plain one exist only on x86.
const InferenceLoops& plain_inference();
#ifdef NMT_MOE_X86
const InferenceLoops& avx2_inference();
const InferenceLoops& avx512_inference();
#endif

}  // namespace nmt_moe
