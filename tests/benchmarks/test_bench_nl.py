"""An optimiser step of the student under AdamW, deep momentum and multi-frequency updates: seconds and peak memory.

Run: pytest tests/benchmarks/test_bench_nl.py --benchmark-only -s

MobileNetV3-Large (4.2 million weights), faces of 64 px, batches of 128, float32. A step is forward, loss, backward, clipping and the
optimiser's step; with accumulation, four batches a step. Time: the arms one after the other within each round, in one process; medians
of a batch's share, and of each round's ratio to AdamW. The memory is read from the first step (no ramp).
Memory: each arm in a process of its own, the most that it ever held (VmHWM; Linux), less what the process held before the network.
To be reached: 32x1 at most 1.5 times AdamW's time.

Measured on a shared two-core AMD EPYC with AVX-512, torch 2.14.1, one thread, other work beside it (load 8 to 10), rounds interleaved:

| | alone | with x4 accumulation | state | peak memory, alone / x4 |
|---|---|---|---|---|
| AdamW | 1.00 (1,670 ms) | 1.00 (1,433 ms a batch) | 32.1 MB | 653 / 659 MB |
| DeepMomentum 32x1 | 1.35 | 1.19 | 48.1 MB | 703 / 707 MB |
| DeepMomentum 64x2 | 2.54 | 1.43 | 48.1 MB | 701 / 728 MB |
| MultiFrequency | 0.96 | 0.82 (noise: it does AdamW's work) | 35.2 MB | 694 / 694 MB |
"""
import json
import platform
import statistics
import subprocess
import sys
import time

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from fer_nb.callbacks import fast_layout, seed_everything
from fer_nb.distillation import make_student
from fer_nb.nl import DeepMomentum, MultiFrequency, depth_periods, state_bytes
from tests.conftest import ROOT

BATCH, SIZE, ROUNDS = 128, 64, {1: 4, 4: 2}
ARMS = {
    "AdamW": lambda m: torch.optim.AdamW(m.parameters(), 1e-3),
    "DeepMomentum 32x1": lambda m: DeepMomentum(m.parameters(), 1e-3, ramp=0),
    "DeepMomentum 64x2": lambda m: DeepMomentum(m.parameters(), 1e-3, ramp=0, hidden=64, layers=2),
    "MultiFrequency": lambda m: MultiFrequency(depth_periods(m), 1e-3),
}


class Arm:
    "A student and its optimiser, on one batch that lies in memory."
    def __init__(self, name):
        seed_everything(1)
        self.model = fast_layout(make_student()).train()
        self.optimizer = ARMS[name](self.model)
        self.x, self.y = torch.randn(BATCH, 3, SIZE, SIZE), torch.arange(BATCH) % 7

    def step(self, accumulate=1):
        "Seconds of one optimiser step, a batch."
        start = time.perf_counter()
        for _ in range(accumulate): (F.cross_entropy(self.model(self.x).float(), self.y)/accumulate).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 5.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return (time.perf_counter() - start)/accumulate


MEASURE = """
import sys, torch
from tests.benchmarks.test_bench_nl import Arm
torch.set_num_threads(1)
def held(): return dict(line.split(":") for line in open("/proc/self/status"))
def mb(key): return int(held()[key].split()[0])/1024
before = mb("VmRSS")
arm = Arm(sys.argv[1])
for _ in range(2): arm.step(int(sys.argv[2]))
print(round(mb("VmHWM") - before))
"""


def peak_mb(name, accumulate):
    "The most memory of an arm, in a process of its own."
    if not sys.platform.startswith("linux"): return 0
    command = [sys.executable, "-W", "ignore", "-c", MEASURE, name, str(accumulate)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.timeout(900)
@pytest.mark.parametrize("accumulate", [1, 4])
def test_a_step_of_each_optimiser(benchmark, accumulate):
    arms = {name: Arm(name) for name in ARMS}
    for a in arms.values(): a.step()
    rounds = {name: [] for name in ARMS}

    def one_round():
        for name, a in arms.items(): rounds[name].append(a.step(accumulate))
    benchmark.pedantic(one_round, rounds=ROUNDS[accumulate])
    print(f"\n{platform.machine()}, torch {torch.__version__}, 1 thread, batches of {BATCH} at {SIZE} px, accumulation {accumulate}")
    ratios = {}
    for name, seconds in rounds.items():
        ratios[name] = statistics.median(s/b for s, b in zip(seconds, rounds["AdamW"]))
        figures = {"ms_a_batch": round(1000*statistics.median(seconds)), "times_adamw": round(ratios[name], 2),
                   "state_mb": round(state_bytes(arms[name].optimizer)/2**20, 1), "peak_mb": peak_mb(name, accumulate)}
        benchmark.extra_info[name] = figures
        print(f"{name:18}", json.dumps(figures))
    assert ratios["DeepMomentum 32x1"] <= 1.5
    assert ratios["MultiFrequency"] <= 1.25
