// Loops over plain memory, compiled once for each set of vector instructions, without torch.
#pragma once

#include <cstdint>

namespace nmt_moe {

// Maximum numbers of rows and columns for `multiply_few`.
constexpr int64_t FEW_ROWS = 16, COLUMN_BLOCK = 256;

template <typename T>
struct Loops {
  // Computes one step of an LSTM for `rows` rows of `width` cells. gates (rows, 4 width), in the order i, f, g, o, are
  // overwritten with their activations.
  void (*lstm_forward)(T* gates, const T* cell_before, T* cell, T* hidden, int64_t rows, int64_t width);

  // Computes the backward pass of that step. grad_cell is the gradient of the new cells, and is overwritten with the
  // gradient of the old cells.
  void (*lstm_backward)(const T* gates, const T* cell_before, const T* cell, const T* grad_hidden, T* grad_cell,
                        T* grad_gates, int64_t rows, int64_t width);

  // Computes one step's product attention for one sentence of `length` positions with `width` elements each. query, the
  // projected query, is overwritten with its tanh. The weights of all positions (0 for padding) and the context are
  // written. scaled is scratch space for one row.
  void (*attend)(T* query, const T* scale, const T* keys, const T* source, const bool* padding, T* scaled, T* weights,
                 T* context, int64_t length, int64_t width);

  // Computes the backward pass of that attention. From the gradients of the context and, unless null, of the weights,
  // it writes the gradients of the scores, the scaled query and the projected query.
  void (*attend_backward)(const T* squashed, const T* scale, const T* keys, const T* source, const T* weights,
                          const T* grad_context, const T* grad_weights, T* grad_scores, T* grad_scaled, T* grad_query,
                          int64_t length, int64_t width);

  // Computes out = rows * weight for at most FEW_ROWS rows (`count`) with `inner` elements each, and for at most
  // COLUMN_BLOCK columns (`columns`). The full weight and result are `width` columns wide.
  void (*multiply_few)(const T* rows, const T* weight, T* out, int64_t count, int64_t inner, int64_t columns,
                       int64_t width);

  // Computes the logarithm of the sum of a row's exponentials, and the row's plain sum.
  void (*log_sum_exp)(const T* logits, T* log_sum, T* sum, int64_t width);

  // Computes grads = scale * e^(logits - log_sum) + shift.
  void (*softmax_gradient)(const T* logits, T log_sum, T scale, T shift, T* grads, int64_t width);

  // Sums the squares in a (rows, width) block. Writes the sums of rows, and adds the sums of columns to column_sums.
  void (*square_sums)(const T* block, T* row_sums, T* column_sums, int64_t rows, int64_t width);

  // Computes weight = keep * weight - step_size * grad / (row_root * column_root + eps) over a (rows, width) block.
  void (*factored_update)(T* weight, const T* grad, const T* row_root, const T* column_root, T step_size, T eps,
                          T keep, int64_t rows, int64_t width);
};

// The loops of each level. Levels other than the plain one exist only on x86.
const Loops<float>& plain_float();
const Loops<double>& plain_double();
#ifdef NMT_MOE_X86
const Loops<float>& avx2_float();
const Loops<double>& avx2_double();
const Loops<float>& avx512_float();
const Loops<double>& avx512_double();
#endif

}  // namespace nmt_moe
