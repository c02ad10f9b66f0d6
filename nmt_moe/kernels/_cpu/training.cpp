// The operators of training: LSTMs, products with experts' matrices, cross-entropy and factored Adam.
#include "operators.h"

namespace nmt_moe {
namespace {

// Factored Adam: number of an expert's rows that a thread takes at a time, and number of experts for which all means
// are updated before any weights are.
constexpr int64_t ROWS_PER_CHUNK = 64, EXPERTS_PER_GROUP = 4;

template <typename T>
void step_forward(T* gates, const T* before, T* cell, T* hidden, int64_t rows, int64_t width) {
  const auto& loops = choose_loops<T>();
  const int64_t grain = std::max<int64_t>(1, CELLS_PER_THREAD / width);
  at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    const int64_t at = first * width;
    loops.lstm_forward(gates + 4 * at, before + at, cell + at, hidden + at, last - first, width);
  });
}

template <typename T>
void step_backward(const T* gates, const T* before, const T* cell, const T* grad_hidden, T* grad_cell, T* grad_gates,
                   int64_t rows, int64_t width) {
  const auto& loops = choose_loops<T>();
  const int64_t grain = std::max<int64_t>(1, CELLS_PER_THREAD / width);
  at::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    const int64_t at = first * width;
    loops.lstm_backward(gates + 4 * at, before + at, cell + at, grad_hidden + at, grad_cell + at, grad_gates + 4 * at,
                        last - first, width);
  });
}

// gates (B, 4 H) are overwritten with their activations. hidden (B, H), the output before any projection, is written.
void lstm_step(Tensor gates, const Tensor& before, Tensor cell, Tensor hidden) {
  AT_DISPATCH_FLOATING_TYPES(gates.scalar_type(), "lstm_step", [&] {
    step_forward(gates.data_ptr<scalar_t>(), before.const_data_ptr<scalar_t>(), cell.data_ptr<scalar_t>(),
                 hidden.data_ptr<scalar_t>(), cell.size(0), cell.size(1));
  });
}

void backward_of_step(const Tensor& gates_t, const Tensor& cells, int64_t step, const Tensor& grad_hidden_t,
                      Tensor& grad_cell, Tensor& grad_gates_t) {
  const Tensor before = cells.select(0, step), cell = cells.select(0, step + 1);
  AT_DISPATCH_FLOATING_TYPES(gates_t.scalar_type(), "lstm_backward", [&] {
    step_backward(gates_t.const_data_ptr<scalar_t>(), before.const_data_ptr<scalar_t>(),
                  cell.const_data_ptr<scalar_t>(), grad_hidden_t.const_data_ptr<scalar_t>(),
                  grad_cell.data_ptr<scalar_t>(), grad_gates_t.data_ptr<scalar_t>(), before.size(0), before.size(1));
  });
}

// gates (T, B, 4 H) contain the input's part and the bias, and are overwritten with their activations. weight_hh is
// (D, 4 H), projection (H, D). cells (T + 1, B, H) and outputs (T + 1, B, D) contain the previous state at index 0, and
// their other steps are written. hidden (T, B, H), the outputs before the projection, is written.
void lstm_forward(Tensor gates, const Tensor& weight_hh, const optional<Tensor>& projection, Tensor cells,
                  Tensor hidden, Tensor outputs) {
  at::AutoDispatchBelowADInplaceOrView guard;
  for (int64_t step = 0; step < gates.size(0); ++step) {
    Tensor gates_t = gates.select(0, step), hidden_t = hidden.select(0, step);
    multiply_into(outputs.select(0, step), weight_hh, gates_t, true);
    lstm_step(gates_t, cells.select(0, step), cells.select(0, step + 1), hidden_t);
    if (projection) {
      multiply_into(hidden_t, *projection, outputs.select(0, step + 1), false);
    }
  }
}

// grad_outputs (T, B, D) is the outputs' gradient from the layer above; the gradient from later steps is added to it.
// grad_cell (B, H) is the gradient of the last cells, and is overwritten with the gradient of the first cells.
// grad_gates (T, B, 4 H) and grad_hidden (B, D) are written. weight_hh (4 H, D) and projection (D, H) have torch's
// layout. cells is (T + 1, B, H).
void lstm_backward(const Tensor& gates, const Tensor& cells, const Tensor& weight_hh,
                   const optional<Tensor>& projection, Tensor grad_outputs, Tensor grad_cell, Tensor grad_gates,
                   Tensor grad_hidden) {
  at::AutoDispatchBelowADInplaceOrView guard;
  Tensor grad_projected = projection ? at::empty_like(grad_cell) : Tensor();
  for (int64_t step = gates.size(0) - 1; step >= 0; --step) {
    Tensor grad_output_t = grad_outputs.select(0, step);
    if (projection) multiply_into(grad_output_t, *projection, grad_projected, false);
    const Tensor& grad_hidden_t = projection ? grad_projected : grad_output_t;
    Tensor grad_gates_t = grad_gates.select(0, step);
    backward_of_step(gates.select(0, step), cells, step, grad_hidden_t, grad_cell, grad_gates_t);
    if (step > 0) {
      multiply_into(grad_gates_t, weight_hh, grad_outputs.select(0, step - 1), true);
    } else {
      multiply_into(grad_gates_t, weight_hh, grad_hidden, false);
    }
  }
}

// Smallest number of sentences that is worth a separate thread.
constexpr int64_t SENTENCES_PER_THREAD = 4;

// Runs an LSTM with attention. Each step reads the token's part of the gates, the previous output, and the context that
// this output attends to. The arguments are the same as for `lstm_forward`, with weight (2 D, 4 H) for context and
// output, and with query (D, D), scale (D), keys and source (B, S, D), and padding (B, S). inputs (T, B, 2 D),
// squashed (T, B, D) and weights (T, B, S) are written.
void attentive_forward(Tensor gates, const Tensor& query, const Tensor& scale, const Tensor& keys, const Tensor& source,
                       const Tensor& padding, const Tensor& weight, const optional<Tensor>& projection, Tensor cells,
                       Tensor hidden, Tensor outputs, Tensor inputs, Tensor squashed, Tensor weights) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t batch = keys.size(0), length = keys.size(1), width = keys.size(2);
  Tensor scaled = at::empty({batch, width}, keys.options());
  for (int64_t step = 0; step < gates.size(0); ++step) {
    Tensor gates_t = gates.select(0, step), hidden_t = hidden.select(0, step), inputs_t = inputs.select(0, step);
    Tensor queries = squashed.select(0, step);
    const Tensor before = outputs.select(0, step), weights_t = weights.select(0, step);
    multiply_into(before, query, queries, false);
    AT_DISPATCH_FLOATING_TYPES(keys.scalar_type(), "attentive_forward", [&] {
      const auto& loops = choose_loops<scalar_t>();
      auto* query_rows = queries.data_ptr<scalar_t>();
      auto* scaled_rows = scaled.data_ptr<scalar_t>();
      auto* weight_rows = weights_t.data_ptr<scalar_t>();
      auto* input_rows = inputs_t.data_ptr<scalar_t>();
      const auto* before_rows = before.const_data_ptr<scalar_t>();
      const auto* scales = scale.const_data_ptr<scalar_t>();
      const auto* key_rows = keys.const_data_ptr<scalar_t>();
      const auto* source_rows = source.const_data_ptr<scalar_t>();
      const auto* paddings = padding.const_data_ptr<bool>();
      at::parallel_for(0, batch, SENTENCES_PER_THREAD, [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; ++at) {
          const int64_t sentence = at * length * width;
          auto* input = input_rows + at * 2 * width;
          loops.attend(query_rows + at * width, scales, key_rows + sentence, source_rows + sentence,
                       paddings + at * length, scaled_rows + at * width, weight_rows + at * length, input, length,
                       width);
          std::copy_n(before_rows + at * width, width, input + width);
        }
      });
    });
    multiply_into(inputs_t, weight, gates_t, true);
    lstm_step(gates_t, cells.select(0, step), cells.select(0, step + 1), hidden_t);
    if (projection) {
      multiply_into(hidden_t, *projection, outputs.select(0, step + 1), false);
    }
  }
}

// The arguments are the same as for `lstm_backward`, with query (D, D) and weight (4 H, 2 D) transposed compared with
// `attentive_forward`. grad_contexts, grad_scaled, grad_queries (T, B, D) and grad_scores (T, B, S) are written.
void attentive_backward(const Tensor& gates, const Tensor& cells, const Tensor& query, const Tensor& scale,
                        const Tensor& keys, const Tensor& source, const Tensor& weight,
                        const optional<Tensor>& projection, const Tensor& squashed, const Tensor& weights,
                        const optional<Tensor>& grad_weights, Tensor grad_outputs, Tensor grad_cell, Tensor grad_gates,
                        Tensor grad_contexts, Tensor grad_scaled, Tensor grad_queries, Tensor grad_scores,
                        Tensor grad_hidden) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t batch = keys.size(0), length = keys.size(1), width = keys.size(2);
  Tensor grad_projected = projection ? at::empty_like(grad_cell) : Tensor();
  Tensor grad_inputs = at::empty({batch, 2 * width}, keys.options());
  for (int64_t step = gates.size(0) - 1; step >= 0; --step) {
    Tensor grad_output_t = grad_outputs.select(0, step), grad_gates_t = grad_gates.select(0, step);
    if (projection) multiply_into(grad_output_t, *projection, grad_projected, false);
    backward_of_step(gates.select(0, step), cells, step, projection ? grad_projected : grad_output_t, grad_cell,
                     grad_gates_t);
    multiply_into(grad_gates_t, weight, grad_inputs, false);
    Tensor grad_before = step > 0 ? grad_outputs.select(0, step - 1) : grad_hidden;
    const Tensor grad_query_t = grad_queries.select(0, step), grad_scaled_t = grad_scaled.select(0, step);
    const Tensor grad_context_t = grad_contexts.select(0, step), grad_scores_t = grad_scores.select(0, step);
    const Tensor squashed_t = squashed.select(0, step), weights_t = weights.select(0, step);
    AT_DISPATCH_FLOATING_TYPES(keys.scalar_type(), "attentive_backward", [&] {
      const auto& loops = choose_loops<scalar_t>();
      const auto* input_rows = grad_inputs.const_data_ptr<scalar_t>();
      const auto* squashed_rows = squashed_t.const_data_ptr<scalar_t>();
      const auto* weight_rows = weights_t.const_data_ptr<scalar_t>();
      const auto* scales = scale.const_data_ptr<scalar_t>();
      const auto* key_rows = keys.const_data_ptr<scalar_t>();
      const auto* source_rows = source.const_data_ptr<scalar_t>();
      const auto* above = grad_weights ? grad_weights->select(0, step).const_data_ptr<scalar_t>() : nullptr;
      auto* query_rows = grad_query_t.data_ptr<scalar_t>();
      auto* scaled_rows = grad_scaled_t.data_ptr<scalar_t>();
      auto* context_rows = grad_context_t.data_ptr<scalar_t>();
      auto* score_rows = grad_scores_t.data_ptr<scalar_t>();
      auto* before_rows = grad_before.data_ptr<scalar_t>();
      at::parallel_for(0, batch, SENTENCES_PER_THREAD, [&](int64_t first, int64_t last) {
        for (int64_t at = first; at < last; ++at) {
          const int64_t sentence = at * length * width, row = at * width;
          const auto* input = input_rows + 2 * row;
          std::copy_n(input, width, context_rows + row);
          loops.attend_backward(squashed_rows + row, scales, key_rows + sentence, source_rows + sentence,
                                weight_rows + at * length, input, above == nullptr ? nullptr : above + at * length,
                                score_rows + at * length, scaled_rows + row, query_rows + row, length, width);
          for (int64_t column = 0; column < width; ++column) before_rows[row + column] += input[width + column];
        }
      });
    });
    multiply_into(grad_query_t, query, grad_before, true);
  }
}

// Multiplies rows (R, D) by their expert's matrix in weight (E, D, F). Expert e owns rows [offsets[e], offsets[e + 1]).
// Rows of out (R, F) that do not belong to any expert are not written.
void multiply_experts(const Tensor& rows, const Tensor& weight, const Tensor& offsets, Tensor out) {
  at::AutoDispatchBelowADInplaceOrView guard;
  const int64_t experts = weight.size(0), inner = weight.size(1), width = weight.size(2);
  const int64_t blocks = (width + COLUMN_BLOCK - 1) / COLUMN_BLOCK;
  const auto* bounds = offsets.const_data_ptr<int64_t>();
  TORCH_CHECK(bounds[0] >= 0 && bounds[experts] <= rows.size(0), "`offsets` must be from 0 to ", rows.size(0),
              ", the number of rows, but are from ", bounds[0], " to ", bounds[experts], ".");
  std::vector<int64_t> few;
  for (int64_t expert = 0; expert < experts; ++expert) {
    const int64_t first = bounds[expert], count = bounds[expert + 1] - first;
    if (count > FEW_ROWS) {
      multiply_into(rows.narrow(0, first, count), weight.select(0, expert), out.narrow(0, first, count), false);
    } else if (count > 0) {
      few.push_back(expert);
    }
  }
  AT_DISPATCH_FLOATING_TYPES(rows.scalar_type(), "multiply_experts", [&] {
    const auto& loops = choose_loops<scalar_t>();
    const auto* all_rows = rows.const_data_ptr<scalar_t>();
    const auto* weights = weight.const_data_ptr<scalar_t>();
    auto* outs = out.data_ptr<scalar_t>();
    at::parallel_for(0, int64_t(few.size()) * blocks, 1, [&](int64_t start, int64_t stop) {
      for (int64_t at = start; at < stop; ++at) {
        const int64_t expert = few[at / blocks], column = at % blocks * COLUMN_BLOCK, first = bounds[expert];
        loops.multiply_few(all_rows + first * inner, weights + expert * inner * width + column,
                           outs + first * width + column, bounds[expert + 1] - first, inner,
                           std::min(COLUMN_BLOCK, width - column), width);
      }
    });
  });
}

// Smallest number of logits that is worth a separate thread.
constexpr int64_t LOGITS_PER_THREAD = 1 << 14;

// logits (N, V); target (N), from 0 to V - 1 or `ignored`. nll, smooth and log_sums (N) are written; they are 0 in
// ignored rows.
void cross_entropy(const Tensor& logits, const Tensor& target, int64_t ignored, Tensor nll, Tensor smooth,
                   Tensor log_sums) {
  const int64_t width = logits.size(1);
  const auto* targets = target.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "cross_entropy", [&] {
    const auto& loops = choose_loops<scalar_t>();
    const auto* rows = logits.const_data_ptr<scalar_t>();
    auto* nlls = nll.data_ptr<scalar_t>();
    auto* smooths = smooth.data_ptr<scalar_t>();
    auto* sums = log_sums.data_ptr<scalar_t>();
    at::parallel_for(0, logits.size(0), std::max<int64_t>(1, LOGITS_PER_THREAD / width), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        nlls[row] = smooths[row] = sums[row] = 0;
        if (targets[row] == ignored) continue;
        TORCH_CHECK_INDEX(targets[row] >= 0 && targets[row] < width, "`target` must be from 0 to ", width - 1, ", or ",
                          ignored, " for an ignored row, but is ", targets[row], " in row ", row, ".");
        scalar_t sum;
        loops.log_sum_exp(rows + row * width, sums + row, &sum, width);
        nlls[row] = sums[row] - rows[row * width + targets[row]];
        smooths[row] = scalar_t(width) * sums[row] - sum;
      }
    });
  });
}

void cross_entropy_backward(const Tensor& logits, const Tensor& target, int64_t ignored, const Tensor& log_sums,
                            const Tensor& grad_nll, const Tensor& grad_smooth, Tensor grad_logits) {
  const int64_t width = logits.size(1);
  const auto* targets = target.const_data_ptr<int64_t>();
  AT_DISPATCH_FLOATING_TYPES(logits.scalar_type(), "cross_entropy_backward", [&] {
    const auto& loops = choose_loops<scalar_t>();
    const auto* rows = logits.const_data_ptr<scalar_t>();
    const auto* sums = log_sums.const_data_ptr<scalar_t>();
    const auto* of_nll = grad_nll.const_data_ptr<scalar_t>();
    const auto* of_smooth = grad_smooth.const_data_ptr<scalar_t>();
    auto* grads = grad_logits.data_ptr<scalar_t>();
    at::parallel_for(0, logits.size(0), std::max<int64_t>(1, LOGITS_PER_THREAD / width), [&](int64_t first, int64_t last) {
      for (int64_t row = first; row < last; ++row) {
        auto* own = grads + row * width;
        if (targets[row] == ignored) {
          std::fill(own, own + width, scalar_t(0));
          continue;
        }
        const scalar_t scale = of_nll[row] + scalar_t(width) * of_smooth[row];
        loops.softmax_gradient(rows + row * width, sums[row], scale, -of_smooth[row], own, width);
        own[targets[row]] -= of_nll[row];
      }
    });
  });
}

template <typename T>
void update_group(T* weight, const T* grad, T* row_mean, T* column_mean, int64_t experts, int64_t rows, int64_t width,
                  T step_size, T beta2, T eps, T keep) {
  const auto& loops = choose_loops<T>();
  const int64_t chunks = (rows + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK;
  std::vector<T> row_sums(experts * rows), column_sums(experts * chunks * width, T(0));
  const auto each_chunk = [&](const auto& work) {
    at::parallel_for(0, experts * chunks, 1, [&](int64_t first, int64_t last) {
      for (int64_t at = first; at < last; ++at) {
        const int64_t expert = at / chunks, start = at % chunks * ROWS_PER_CHUNK;
        work(at, expert, expert * rows + start, std::min(ROWS_PER_CHUNK, rows - start));
      }
    });
  };
  each_chunk([&](int64_t at, int64_t, int64_t row, int64_t count) {
    loops.square_sums(grad + row * width, row_sums.data() + row, column_sums.data() + at * width, count, width);
  });
  std::vector<T> row_roots(experts * rows), column_roots(experts * width);
  for (int64_t expert = 0; expert < experts; ++expert) {
    T total = 0;
    T* own_rows = row_mean + expert * rows;
    for (int64_t row = 0; row < rows; ++row) {
      own_rows[row] = beta2 * own_rows[row] + (1 - beta2) / T(width) * row_sums[expert * rows + row];
      total += own_rows[row];
    }
    const T mean = std::max(total / T(rows), std::numeric_limits<T>::min());  // if all means are 0, 0 / min is 0
    for (int64_t row = 0; row < rows; ++row) row_roots[expert * rows + row] = std::sqrt(own_rows[row] / mean);
    T* own_columns = column_mean + expert * width;
    T* sums = column_sums.data() + expert * chunks * width;
    for (int64_t chunk = 1; chunk < chunks; ++chunk) {
      for (int64_t at = 0; at < width; ++at) sums[at] += sums[chunk * width + at];
    }
    for (int64_t at = 0; at < width; ++at) {
      own_columns[at] = beta2 * own_columns[at] + (1 - beta2) / T(rows) * sums[at];
      column_roots[expert * width + at] = std::sqrt(own_columns[at]);
    }
  }
  each_chunk([&](int64_t, int64_t expert, int64_t row, int64_t count) {
    loops.factored_update(weight + row * width, grad + row * width, row_roots.data() + row,
                          column_roots.data() + expert * width, step_size, eps, keep, count, width);
  });
}

// weight and grad (E, D, H), row_mean (E, D), column_mean (E, H). All except grad are updated in place.
void factored_adam(Tensor weight, const Tensor& grad, Tensor row_mean, Tensor column_mean, double step_size,
                   double beta2, double eps, double keep) {
  const int64_t experts = weight.size(0), rows = weight.size(1), width = weight.size(2);
  AT_DISPATCH_FLOATING_TYPES(weight.scalar_type(), "factored_adam", [&] {
    for (int64_t first = 0; first < experts; first += EXPERTS_PER_GROUP) {
      update_group(weight.data_ptr<scalar_t>() + first * rows * width,
                   grad.const_data_ptr<scalar_t>() + first * rows * width, row_mean.data_ptr<scalar_t>() + first * rows,
                   column_mean.data_ptr<scalar_t>() + first * width, std::min(EXPERTS_PER_GROUP, experts - first), rows,
                   width, scalar_t(step_size), scalar_t(beta2), scalar_t(eps), scalar_t(keep));
    }
  });
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(nmt_moe, library) {
  library.def("lstm_step(Tensor(a!) gates, Tensor before, Tensor(b!) cell, Tensor(c!) hidden) -> ()");
  library.def(
      "lstm_forward(Tensor(a!) gates, Tensor weight_hh, Tensor? projection, Tensor(b!) cells, Tensor(c!) hidden, "
      "Tensor(d!) outputs) -> ()");
  library.def(
      "lstm_backward(Tensor gates, Tensor cells, Tensor weight_hh, Tensor? projection, Tensor(a!) grad_outputs, "
      "Tensor(b!) grad_cell, Tensor(c!) grad_gates, Tensor(d!) grad_hidden) -> ()");
  library.def(
      "attentive_forward(Tensor(a!) gates, Tensor query, Tensor scale, Tensor keys, Tensor source, Tensor padding, "
      "Tensor weight, Tensor? projection, Tensor(b!) cells, Tensor(c!) hidden, Tensor(d!) outputs, Tensor(e!) inputs, "
      "Tensor(f!) squashed, Tensor(g!) weights) -> ()");
  library.def(
      "attentive_backward(Tensor gates, Tensor cells, Tensor query, Tensor scale, Tensor keys, Tensor source, "
      "Tensor weight, Tensor? projection, Tensor squashed, Tensor weights, Tensor? grad_weights, "
      "Tensor(a!) grad_outputs, Tensor(b!) grad_cell, Tensor(c!) grad_gates, Tensor(d!) grad_contexts, "
      "Tensor(e!) grad_scaled, Tensor(f!) grad_queries, Tensor(g!) grad_scores, Tensor(h!) grad_hidden) -> ()");
  library.def("multiply_experts(Tensor rows, Tensor weight, Tensor offsets, Tensor(a!) out) -> ()");
  library.def(
      "cross_entropy(Tensor logits, Tensor target, int ignored, Tensor(a!) nll, Tensor(b!) smooth, "
      "Tensor(c!) log_sums) -> ()");
  library.def(
      "cross_entropy_backward(Tensor logits, Tensor target, int ignored, Tensor log_sums, Tensor grad_nll, "
      "Tensor grad_smooth, Tensor(a!) grad_logits) -> ()");
  library.def(
      "factored_adam(Tensor(a!) weight, Tensor grad, Tensor(b!) row_mean, Tensor(c!) column_mean, float step_size, "
      "float beta2, float eps, float keep) -> ()");
}

TORCH_LIBRARY_IMPL(nmt_moe, CPU, library) {
  library.impl("lstm_step", lstm_step);
  library.impl("lstm_forward", lstm_forward);
  library.impl("lstm_backward", lstm_backward);
  library.impl("attentive_forward", attentive_forward);
  library.impl("attentive_backward", attentive_backward);
  library.impl("multiply_experts", multiply_experts);
  library.impl("cross_entropy", cross_entropy);
  library.impl("cross_entropy_backward", cross_entropy_backward);
  library.impl("factored_adam", factored_adam);
}

}  // namespace nmt_moe
