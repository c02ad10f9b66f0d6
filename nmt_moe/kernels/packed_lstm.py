"""Run LSTMs in inference, with packed weights; cells and states stay in float32."""

import torch
from torch import Tensor

from nmt_moe.kernels._cpu import has_compiled_loops, load
from nmt_moe.kernels.quantised import PackedLinear


class PackedLSTM:
    """An LSTM, with a projection of its outputs if there are weights for one.

    Attributes:
        cell_dim: Number of cells, H.
        output_dim: Width of the outputs, D.

    Source: Sak et al. 2014 (without peepholes).
    """

    def __init__(
        self, of_input: PackedLinear, of_output: PackedLinear, projection: PackedLinear | None
    ) -> None:
        """Build the LSTM.

        Args:
            of_input: (4 H, I), the weights of the inputs and the bias, in torch's order of gates:
                i, f, g, o.
            of_output: (4 H, D), the weights of the previous step's outputs.
            projection: (D, H); None if outputs are not projected.
        """
        self.of_input, self.of_output, self.projection = of_input, of_output, projection
        self.cell_dim = of_input.shape[0] // 4
        self.output_dim = self.cell_dim if projection is None else projection.shape[0]
        self._all_panels: list[Tensor | None] | None = None

    def start(self, num_rows: int) -> tuple[Tensor, Tensor]:
        """Return the state before the first step: (R, D) outputs and (R, H) cells."""
        return torch.zeros(num_rows, self.output_dim), torch.zeros(num_rows, self.cell_dim)

    def step(
        self, x: Tensor, output: Tensor, cell: Tensor, parents: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run one step.

        Args:
            x: (R, I), the inputs.
            output: (P, D), the previous step's outputs; with attention, (P, 2 D), the contexts and
                these outputs.
            cell: (P, H), the previous step's cells.
            parents: (R,) int64, the row of `output` and `cell` that each row continues; None if row
                r continues row r.

        Returns:
            (R, D) outputs and (R, H) cells.
        """
        panels = self._panels()
        if panels is not None:
            return self._step_panels(panels, x, None, output, cell, parents)
        return self._finish_step(self.of_input(x), output, cell, parents)

    def step_tokens(
        self,
        table: Tensor,
        tokens: Tensor,
        output: Tensor,
        cell: Tensor,
        parents: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Run one step, with the products of the inputs read from a table.

        Args:
            table: (V, 4 H), the result of `of_input` for every possible input.
            tokens: (R,) int64, the rows of `table` to read.
            output: (P, D), as in `step`.
            cell: (P, H), as in `step`.
            parents: (R,) int64, as in `step`.

        Returns:
            (R, D) outputs and (R, H) cells, the same as those of `step`.
        """
        panels = self._panels()
        if panels is not None:
            return self._step_panels(panels, table, tokens, output, cell, parents)
        return self._finish_step(table[tokens], output, cell, parents)

    def run(self, x: Tensor, lengths: list[int]) -> Tensor:
        """Run the LSTM over whole sentences.

        Args:
            x: (S, B, I) inputs.
            lengths: Length of each sentence, in descending order.

        Returns:
            (S, B, D); 0 at padded positions.
        """
        return self.run_gates(self.of_input(x), lengths)

    def run_gates(self, gates: Tensor, lengths: list[int]) -> Tensor:
        """Run the LSTM over whole sentences, given the results of `of_input` for all inputs.

        Args:
            gates: (S, B, 4 H), which are overwritten.
            lengths: Length of each sentence, in descending order.

        Returns:
            (S, B, D); 0 at padded positions.
        """
        counts, num_rows = [], len(lengths)
        for step in range(len(gates)):
            while lengths[num_rows - 1] <= step:
                num_rows -= 1
            counts.append(num_rows)
        panels = self._panels()
        if panels is not None:
            return load().packed_lstm(gates, *panels[1:], counts, self.output_dim)
        outputs = gates.new_zeros(*gates.shape[:2], self.output_dim)
        output, cell = self.start(gates.shape[1])
        for step, (gates_t, count) in enumerate(zip(gates.unbind(0), counts, strict=True)):
            gates_t = self.of_output(output[:count], gates_t[:count])
            output, cell = self._finish(gates_t, cell[:count])
            outputs[step, :count] = output
        return outputs

    def _panels(self) -> tuple[Tensor, Tensor, Tensor | None] | None:
        """Return the weights in panels, or None if any are multiplied in another way."""
        if self._all_panels is None:
            products = self.of_input, self.of_output, self.projection
            self._all_panels = [None if one is None else one.panels() for one in products]
        of_input, of_output, projection = self._all_panels
        if of_input is None or of_output is None:
            return None
        if self.projection is not None and projection is None:
            return None
        return of_input, of_output, projection

    def _step_panels(
        self,
        panels: tuple[Tensor, Tensor, Tensor | None],
        x: Tensor,
        tokens: Tensor | None,
        output: Tensor,
        cell: Tensor,
        parents: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        of_input, of_output, projection = panels
        bias = self.of_input.bias
        return load().packed_lstm_step(
            x, tokens, of_input, bias, output, of_output, cell, parents, projection, self.output_dim
        )

    def _finish_step(
        self, gates: Tensor, output: Tensor, cell: Tensor, parents: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        if parents is None:
            return self._finish(gates.add_(self.of_output(output)), cell)
        # A hypothesis that several rows continue is multiplied only once.
        used, number = parents.unique(return_inverse=True)
        return self._finish(gates.add_(self.of_output(output[used])[number]), cell[parents])

    def _finish(self, gates: Tensor, cell: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the outputs and cells from the gates (R, 4 H), which are overwritten."""
        if has_compiled_loops(gates, cell) and gates.is_contiguous():
            before, cell, hidden = cell.contiguous(), *cell.new_empty(2, *cell.shape).unbind(0)
            load().lstm_step(gates, before, cell, hidden)
        else:
            i, f, g, o = gates.chunk(4, dim=1)
            cell = torch.addcmul(f.sigmoid_() * cell, i.sigmoid_(), g.tanh_())
            hidden = torch.tanh(cell).mul_(o.sigmoid_())
        return hidden if self.projection is None else self.projection(hidden), cell
