// Loops over plain memory, compiled once for each set of vector instructions. No torch in here.
#pragma once

#include <cstdint>

namespace nmt_moe {

constexpr int64_t FEW_ROWS = 16, COLUMN_BLOCK = 256;

template <typename T>
struct Loops {
  // One step of an LSTM, `rows` rows of `width` cells; gates (rows, 4 width) are i, f, g, o.
  // Gates come as sums and leave as activations.
  void (*lstm_forward)(T* gates, const T* cell_before, T* cell, T* hidden, int64_t rows, int64_t width);

  // Its backward pass. grad_cell comes as the gradient of the new cells, and leaves as that of the old.
  void (*lstm_backward)(const T* gates, const T* cell_before, const T* cell, const T* grad_hidden, T* grad_cell,
                        T* grad_gates, int64_t rows, int64_t width);

  // One step's product attention for one sentence of `length` positions of `width`: from the projected query, its
  // tanh, the weights of all positions (0 where `padding` is) and the context. `scaled` is scratch for one row.
  void (*attend)(T* query, const T* scale, const T* keys, const T* source, const bool* padding, T* scaled, T* weights,
                 T* context, int64_t length, int64_t width);

  // Its backward pass, from the gradients of the context and, unless null, of the weights: those of the scores, of the
  // scaled query, and of the projected query.
  void (*attend_backward)(const T* squashed, const T* scale, const T* keys, const T* source, const T* weights,
                          const T* grad_context, const T* grad_weights, T* grad_scores, T* grad_scaled, T* grad_query,
                          int64_t length, int64_t width);

  // out = rows weight, for few rows: `count` up to FEW_ROWS rows of `inner`, and `columns` up to COLUMN_BLOCK columns of a
  // weight and of a result that are both `width` wide.
  void (*multiply_few)(const T* rows, const T* weight, T* out, int64_t count, int64_t inner, int64_t columns,
                       int64_t width);

  // The logarithm of the sum of a row's exponentials, and the row's sum.
  void (*log_sum_exp)(const T* logits, T* log_sum, T* sum, int64_t width);

  // grads = scale e^(logits - log_sum) + shift.
  void (*softmax_gradient)(const T* logits, T log_sum, T scale, T shift, T* grads, int64_t width);

  // Sums of squares of a (rows, width) block: each row's are written, each column's added.
  void (*square_sums)(const T* block, T* row_sums, T* column_sums, int64_t rows, int64_t width);

  // weight = keep weight - step_size grad / (row_root column_root + eps), over a (rows, width) block.
  void (*factored_update)(T* weight, const T* grad, const T* row_root, const T* column_root, T step_size, T eps,
                          T keep, int64_t rows, int64_t width);
};

// The loops of each level; levels other than the plain one are there on x86 alone.
const Loops<float>& plain_float();
const Loops<double>& plain_double();
#ifdef NMT_MOE_X86
const Loops<float>& avx2_float();
const Loops<double>& avx2_double();
const Loops<float>& avx512_float();
const Loops<double>& avx512_double();
#endif

}  // namespace nmt_moe
