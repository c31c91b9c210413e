"""The sum over ranks in PyTorch against its meaning, over the op's table of cases, by two processes that talk."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from arriero.plugins.all_reduce.cases import CASES, Case
from arriero.plugins.all_reduce.meaning import all_reduce
from arriero.plugins.all_reduce.torch_op import all_reduce as torch_all_reduce

RANK = """
import sys
from pathlib import Path
import numpy as np, torch
from arriero.plugins.all_reduce.cases import CASES
from arriero.plugins.all_reduce.torch_op import all_reduce
rank, folder = int(sys.argv[1]), Path(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'meeting'}", rank=rank, world_size=2)
for case in CASES:
    if case.attributes.ranks == 2:
        total = all_reduce(torch.from_numpy(case.parts()[rank]), 2)
        np.save(folder / f"{case.name}.{rank}.npy", total.numpy())
torch.distributed.destroy_process_group()
"""


@pytest.fixture(scope="module")
def totals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(rank), str(folder)], stderr=subprocess.PIPE, text=True)
        for rank in range(2)
    ]
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 0, said
    return folder


@pytest.mark.parametrize("case", [case for case in CASES if case.attributes.ranks == 2], ids=lambda case: case.name)
def test_every_rank_gets_the_sum(totals: Path, case: Case) -> None:
    expected = all_reduce(case.parts())
    for rank in range(2):
        assert np.abs(np.load(totals / f"{case.name}.{rank}.npy") - expected).max() < 1e-6


def test_one_rank_gets_its_own_part() -> None:
    case = next(case for case in CASES if case.attributes.ranks == 1)
    assert np.array_equal(torch_all_reduce(torch.from_numpy(case.parts()[0]), 1).numpy(), all_reduce(case.parts()))
