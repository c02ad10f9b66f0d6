import json

import pytest
import torch

from benchmarks import optimizers

TINY = ["--experts", "3", "--dim", "4", "--hidden", "8"]


def test_the_table_has_a_row_for_each_optimizer(capsys, tmp_path):
    path = tmp_path / "found.json"
    optimizers.main([*TINY, "--rounds", "2", "--threads", "1", "--json", str(path)])
    table, note = capsys.readouterr().out.strip().split("\n\n")
    rows = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]
    ]
    assert [row[0] for row in rows] == list(optimizers.optimizers())
    assert rows[0][3] == "1.00"
    assert "3 experts, 4 x 8" in note
    assert [len(row["seconds"]) for row in json.loads(path.read_text())["rows"]] == [2] * len(rows)


def test_the_state_of_an_optimizer_is_counted():
    parameter = torch.nn.Parameter(torch.randn(3, 4, 8))
    parameter.grad = torch.randn(3, 4, 8)
    factored = optimizers.optimizers()[optimizers.FACTORED]([parameter])
    fused = optimizers.optimizers()["torch fused"]([parameter])
    for optimizer in (factored, fused):
        optimizer.step()
    assert optimizers.state_bytes(factored) == 3 * (4 + 8) * 4
    assert optimizers.state_bytes(fused) == 2 * 3 * 4 * 8 * 4 + 4  # 4 bytes count the updates


def test_sizes_below_one_are_refused():
    with pytest.raises(SystemExit, match="--experts, --dim and --hidden must be at least 1"):
        optimizers.main(["--experts", "0"])
