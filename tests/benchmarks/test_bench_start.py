"""What `fer-nb predict` costs from a cold start, in seconds of a processor, beside the imports that no such command can do without.

Run: OMP_NUM_THREADS=1 pytest tests/benchmarks/test_bench_start.py --benchmark-only
"""
import resource
import statistics
import subprocess
import sys

import cv2
import numpy as np

from fer_nb.painting import framed_face

CEILING = 4  # times `import numpy, cv2, onnxruntime`


def seconds(*command) -> float:
    "Of a processor, user and system, that a process takes."
    def spent(): return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
    before = spent()
    subprocess.run([sys.executable, *command], check=True, capture_output=True)
    return spent() - before


def test_predict_from_a_cold_start(benchmark, tmp_path):
    "In turns, so that a busy machine is busy for both."
    path = str(tmp_path/"two.png")
    cv2.imwrite(path, np.hstack([framed_face(i, size=150, frame=(240, 320)).image for i in (3, 5)]))
    commands = {"imports": ("-c", "import numpy, cv2, onnxruntime"), "predictor": ("-c", "from fer_nb.deploy import Predictor"),
                "predict": ("-m", "fer_nb.cli", "predict", path, "--detector", "haar")}
    rounds = []
    benchmark.pedantic(lambda: rounds.append({k: seconds(*c) for k, c in commands.items()}), rounds=9, warmup_rounds=1)
    least = {k: min(r[k] for r in rounds) for k in commands}
    benchmark.extra_info |= least | {f"{k}, median": statistics.median(r[k] for r in rounds) for k in commands}
    print({k: round(v, 3) for k, v in least.items()}, f"{least['predict']/least['imports']:.2f} times")
    assert least["predict"] <= CEILING*least["imports"]
