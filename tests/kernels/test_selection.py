"""On a machine with a GPU, `-m gpu` selects the kernel tests that are interpreted elsewhere."""

import os
import subprocess
import sys

# This program collects the tests as a machine with one CUDA device would.
PROGRAM = """
import sys, pytest, torch
torch.cuda.is_available, torch.cuda.device_count = lambda: True, lambda: 1
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *sys.argv[1:]]))
"""
FILES = ["test_gating_triton", "test_gate_logits", "test_factored_adam", "test_gather_rows"]
FILES += ["test_expert_ffn", "test_grouped_gemm"]


def test_kernel_tests_are_selected_on_a_machine_with_a_gpu(repository):
    environment = {key: text for key, text in os.environ.items() if key != "TRITON_INTERPRET"}
    files = [f"tests/kernels/{name}.py" for name in FILES]
    files += ["tests/moe/test_on_a_device.py", "tests/moe/test_capture.py"]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "-m", "gpu", *files],
        cwd=repository,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    selected = [line for line in done.stdout.splitlines() if "::" in line]
    for file in files:
        assert any(line.startswith(file) for line in selected), file
    names = {line.split("::")[1].split("[")[0] for line in selected}
    assert {
        "test_kernels_compute_the_definition",
        "test_triton_follows_the_definition",
        "test_triton_reaches_beyond_two_to_the_31_elements",
        "test_positions_beyond_two_to_the_31",
        "test_values_and_gradients",
        "test_bfloat16_on_a_gpu",
        "test_each_replay_of_a_graph_draws_new_noise",
        "test_a_device_computes_the_same_and_the_host_never_waits",
    } <= names
    # Tests of paths that run only on the CPU are not selected.
    assert not any("[loop" in line or "test_loop[" in line for line in selected)
