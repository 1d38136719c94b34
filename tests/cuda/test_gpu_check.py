"""``make gpu-check``, and the tests that need a GPU, as far as pretended CUDA can run them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from bench.gpu_check import main

ROOT = Path(__file__).parents[2]
CHECK = """
import sys
import pretend_cuda
pretend_cuda.install()
import torch
torch.__future__.set_swap_module_params_on_conversion(False)  # a random EnCodec's weights cannot be swapped
torch.__future__.set_overwrite_module_params_on_conversion(True)
from bench.gpu_check import main
main(sys.argv[1:])
"""
TESTS = """
import sys
import pretend_cuda
pretend_cuda.install()
import pytest
sys.exit(pytest.main(sys.argv[1:]))
"""
NEEDS_A_CARD = "compiled or kernel or graph or vab_plan or peak_memory or ceiling"


def pretended(code, *arguments):
    paths = os.pathsep.join([str(Path(__file__).parent), str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"PYTHONPATH": paths, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_it_is_one_line(capsys):
    with pytest.raises(SystemExit) as stop:
        main([])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: gpu-check needs a GPU that torch can use; vab doctor says what is missing"
    ]


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_table_is_made_of_each_task():
    flags = "--size=tiny --batch_size=4 --seconds=1 --repeats=1 --width=64 --skip_tests --skip_compile"
    done = pretended(CHECK, *flags.split())
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in done.stdout.splitlines() if "|" in line]
    rows = {what: (measured, verdict) for what, measured, _, verdict in cells}
    assert "Pretend GPU, 80.0 GiB" in done.stdout, done.stderr
    for task in ("pretrain", "align", "classify"):
        difference, verdict = rows[f"{task}: gradient, bf16-mixed - float32"]
        assert 0 < float(difference.rstrip("%")) < 5
        assert verdict == "ok"
        assert rows[f"{task}: 4 records, eager: waits of the host"][1] == "ok"
        assert " records/s, MFU " in rows[f"{task}: 4 records, eager: a step"][0]
    assert rows["generate: 8 at once"][1] == "ok"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_tests_that_need_a_gpu_run_and_pass():
    files = ("tests/cuda/test_gpu.py", "tests/tokens/test_noise.py", "tests/frozen/judges/test_panns.py")
    done = pretended(TESTS, "-q", "-m", "needs_cuda", "-k", f"not ({NEEDS_A_CARD})", *files)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
