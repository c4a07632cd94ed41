"""What a long run keeps in memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glp_lens.pipeline.stages import Stage, run_stages

glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries return freed memory themselves")
_SIZE = 2**14


def used():
    """Bytes of memory that this process holds and no file backs."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) * 1024


@glibc
def test_what_a_stage_freed_is_returned_to_the_system(tmp_path):
    kept = []

    def work():
        made = [np.ones(_SIZE, dtype=np.uint8) for _ in range(10_000)]
        kept.append(made[-1])  # above the rest of the heap, which so cannot shrink by itself

    before = used()
    run_stages([Stage("one", (), (), (), work)], {}, tmp_path, overwrite=False, say=lambda _: None)
    assert used() - before < 5_000 * _SIZE


_SHAPES = """
import sys
from pathlib import Path
import torch
from typer.testing import CliRunner
from glp_lens_cli import app

CliRunner().invoke(app, ["tasks", "--help"])
layer = torch.nn.Linear(64, 64).bfloat16()

def used(shapes):
    with torch.no_grad():
        for n in shapes:
            layer(torch.ones(n, 64, dtype=torch.bfloat16))
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("RssAnon")).split()[1])

first = used(range(1, 300))
print(used(range(300, 900)) - first)
"""


def grown(**environment):
    """KiB that a process takes for products of 600 more shapes, after a command line was read."""
    run = [sys.executable, "-c", _SHAPES]
    done = subprocess.run(run, env={**os.environ, **environment}, capture_output=True, text=True, check=True)
    return int(done.stdout)


@glibc
def test_products_of_many_shapes_do_not_add_up(monkeypatch):
    for name in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        monkeypatch.delenv(name, raising=False)
    many = grown(ONEDNN_PRIMITIVE_CACHE_CAPACITY="1024", LRU_CACHE_CAPACITY="1024")
    if many < 50 * 1024:
        pytest.skip(f"this processor keeps {many} KiB")
    assert grown() < many / 2
