"""What the processes of a scaling run on one machine start with."""

import os
import subprocess
import sys

from glp_lens.pipeline import scale

LOOK = "import os; from tqdm.auto import tqdm; print(os.environ['OPENBLAS_NUM_THREADS'], tqdm(range(3)).disable)"


def test_side_by_side_processes_share_the_cores_and_show_no_bars(monkeypatch):
    module = sys.modules[scale.__module__]
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    with module._environment(3):
        out = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True, check=True).stdout
    assert out.split() == ["3", "True"]
    assert os.environ["OMP_NUM_THREADS"] == "7"
    assert "TQDM_DISABLE" not in os.environ
