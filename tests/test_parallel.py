"""Two processes with batches of 16 train the weights that one trains with batches of 32."""
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fer_nb.training import embedded_data
from tests.conftest import ROOT


@pytest.fixture(scope="module")
def faces(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faces")
    embedded_data(folder, 400, 32, 7)
    return folder


def trained(faces, folder, world, batch_size, accumulate=1):
    "The weights that each process ended with."
    folder.mkdir()
    for name in ("manifests", "cache"): shutil.copytree(faces/name, folder/name)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world)}
    env = env if world > 1 else {k: v for k, v in env.items() if k != "WORLD_SIZE"}
    command = [sys.executable, "-m", "tests.parallel_worker", str(folder), str(batch_size), str(accumulate)]
    running = [subprocess.Popen(command, cwd=ROOT, env=env | ({"RANK": str(r)} if world > 1 else {}), stderr=subprocess.PIPE, text=True)
               for r in range(world)]
    try: said = [p.communicate(timeout=280)[1] for p in running]
    finally:
        for p in running: p.kill()
    assert [p.returncode for p in running] == [0]*world, "\n".join(said)[-3000:]
    return [torch.load(folder/f"weights_{r}.pt", weights_only=True) for r in range(world)]


@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_processes_are_one_of_twice_the_batch(faces, tmp_path, accumulate):
    one, = trained(faces, tmp_path/"one", 1, 32, accumulate)
    two = trained(faces, tmp_path/"two", 2, 16, accumulate)
    assert torch.equal(*two)
    assert (one - two[0]).abs().max() < 1e-5
    start, = trained(faces, tmp_path/"other", 1, 16, accumulate)
    assert (one - start).abs().max() > 1e-3  # another batch size is another training: the test can fail
    assert Path((tmp_path/"two"/"wrote_0.txt").read_text()) == tmp_path/"two"/"run"
    assert not Path((tmp_path/"two"/"wrote_1.txt").read_text()).exists()
    assert sorted(p.name for p in (tmp_path/"two"/"run").iterdir()) == [
        "best.pt", "checkpoint_last.pt", "history.csv", "history.json", "valid_logits.npz"]
