"""The one-pass sums against the eager form, in Triton's interpreter."""

import json
import os
import subprocess
import sys

import pytest
import torch

from sglang_cachedit_plugin.cache import similarity

pytest.importorskip("triton", reason="wheels of torch for the CPU come without Triton")

SCRIPT = """
import json, torch
from sglang_cachedit_plugin.cache import similarity
rows = []
for size in (1, 4095, 4096, 5000, 528 * 4096 + 17):
    generator = torch.Generator().manual_seed(size)
    known, now = (torch.randn(size, generator=generator).bfloat16() for _ in range(2))
    eager = torch.stack([(now.double() - known.double()).abs().sum(), known.double().abs().sum()])
    rows.append([similarity.difference_sums(known, now).tolist(), eager.tolist()])
known[7] = float("nan")
print(json.dumps([rows, similarity.difference_sums(known, now).isnan().tolist()]))
"""


def test_sums_equal_the_eager_form_and_carry_nan():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, check=True, timeout=300
    )
    rows, nan = json.loads(done.stdout)
    for ours, eager in rows:
        assert ours == pytest.approx(eager, rel=1e-5)
    assert nan == [True, True]


def test_the_cpu_takes_the_eager_form():
    assert not similarity.usable(torch.ones(3))
