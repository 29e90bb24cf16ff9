"""Building and validating a manifest against a bare loop that only reads and decodes the same zips.

Run: pytest tests/benchmarks/test_bench_manifest.py --benchmark-only -s

Measured in one run, interleaved round by round, best round of each:
- loop: `for name in zip: cv2.imdecode(zip.read(name))`, and the same loop split over one process a core;
- build: one reading of every picture: sha256, pixel hash, perceptual hash, groups, splits, files, manifest_validation.json;
- validate: `validate_manifest`, a second reading of every picture from scratch.
The ceiling is for build (decode all, sha256, pixel hash, validated) over the loop.

Many small pictures: FER_NB_BENCH_N drawn JPEGs (40,000 unless told otherwise) in one zip, each stage in a process of its own: seconds,
CPU seconds and bytes of memory a row. With FER_NB_AGAINST=FOLDER, another checkout, the same is measured there in turn, and no stage
may take more than a tenth more time or memory than there.
"""
import gc
import json
import multiprocessing
import os
import resource
import subprocess
import sys
import time
import zipfile

import cv2
import numpy as np
import pytest

from fer_nb import archives
from fer_nb.artifacts import CLASSES
from fer_nb.audit import validate_manifest
from fer_nb.likeness import usable_cores
from fer_nb.manifests import build_manifest

CEILING, ROUNDS = 1.5, 5


def loop(zips, part=0, of=1):
    "Read and decode, nothing else."
    n = 0
    for path in zips:
        with zipfile.ZipFile(path) as z:
            for name in z.namelist()[part::of]:
                if name.endswith((".jpg", ".png")):
                    cv2.imdecode(np.frombuffer(z.read(name), np.uint8), cv2.IMREAD_UNCHANGED)
                    n += 1
    return n


def split_loop(zips):
    "The same loop, one process a core."
    cores = usable_cores()
    with multiprocessing.get_context("fork").Pool(cores) as pool: pool.starmap(loop, [(zips, k, cores) for k in range(cores)])


def cpu_seconds():
    return sum(r.ru_utime + r.ru_stime for r in map(resource.getrusage, (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)))


def spend(f):
    "Wall and CPU seconds of a call, CPU over all its processes."
    archives._archives.clear()  # nothing stays open from the round before
    gc.collect()
    wall, cpu = time.perf_counter(), cpu_seconds()
    f()
    return time.perf_counter() - wall, cpu_seconds() - cpu


@pytest.mark.skipif(sys.platform != "linux", reason="workers are forked on Linux only")
@pytest.mark.benchmark(group="manifest")
def test_build_and_validate_over_a_bare_loop(benchmark, real_data, tmp_path):
    zips = [real_data / "fer2013.zip", real_data / "ferplus.zip"]
    sources, out = [f"fer2013_folder={zips[0]}", f"ferplus={zips[1]}"], tmp_path / "m"
    n = loop(zips)
    runs = {"loop": lambda: loop(zips), "split_loop": lambda: split_loop(zips),
            "build": lambda: build_manifest(sources, out, progress=False), "validate": lambda: validate_manifest(out, progress=False)}
    spent = {name: [] for name in runs}

    def one_round():
        for name, f in runs.items(): spent[name].append(spend(f))

    benchmark.pedantic(one_round, rounds=ROUNDS if benchmark.enabled else 2)
    wall, cpu = ({name: min(t[k] for t in times) for name, times in spent.items()} for k in (0, 1))
    both = wall["build"] + wall["validate"]
    figures = {"images": n, "cores": usable_cores(), **{f"{name}_s": round(t, 2) for name, t in wall.items()},
               **{f"{name}_cpu_s": round(t, 2) for name, t in cpu.items()},
               "build_over_loop": round(wall["build"] / wall["loop"], 2),
               "build_over_split_loop": round(wall["build"] / wall["split_loop"], 2),
               "build_and_second_reading_over_loop": round(both / wall["loop"], 2),
               "build_cpu_over_loop_cpu": round(cpu["build"] / cpu["loop"], 2),
               **{f"{name}_images_per_second": round(n / wall[name]) for name in ("loop", "build", "validate")}}
    benchmark.extra_info.update(figures)
    print("\n" + "\n".join(f"{k:36s} {v}" for k, v in figures.items()))
    assert figures["build_over_loop"] <= CEILING, figures


STAGE = """
import json, resource, sys, time
from fer_nb import audit, manifests
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
stage, source, out = sys.argv[1:]
began = time.perf_counter()
if stage == "build": manifests.build_manifest([f"folder={source}"], out, progress=False)
elif stage == "audit": audit.audit_manifest(out)
else: audit.validate_manifest(out, progress=False)
wall = time.perf_counter() - began
own, children = (resource.getrusage(k) for k in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
print(json.dumps({"wall": wall, "cpu": own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime,
                  "bytes": 1024*(max(own.ru_maxrss, children.ru_maxrss) - before)}))
"""


def draw_zip(path, n, seed=0):
    "Small JPEGs that differ, as datasets of crops have them: class folders, four fifths of them for training."
    rng = np.random.default_rng(seed)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as z:
        for k in range(n):
            small = rng.integers(0, 256, (6, 6), dtype=np.uint8)
            face = cv2.resize(small, (48, 48), interpolation=cv2.INTER_CUBIC)
            part = "test" if k % 5 == 0 else "train"
            z.writestr(f"{part}/{CLASSES[k % 7].lower()}/{k:06d}.jpg", cv2.imencode(".jpg", face)[1].tobytes())


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is counted otherwise elsewhere")
@pytest.mark.benchmark(group="manifest")
def test_many_small_pictures(benchmark, tmp_path):
    n, rounds = int(os.environ.get("FER_NB_BENCH_N", 40_000)), int(os.environ.get("FER_NB_BENCH_ROUNDS", 3))
    trees = {"here": os.getcwd()} | ({"there": os.environ["FER_NB_AGAINST"]} if "FER_NB_AGAINST" in os.environ else {})
    draw_zip(tmp_path/"many.zip", n)
    spent = {(t, s): [] for t in trees for s in ("build", "audit", "validate")}

    def one_round():
        for stage in ("build", "audit", "validate"):
            for tree, folder in trees.items():
                command = [sys.executable, "-c", STAGE, stage, str(tmp_path/"many.zip"), str(tmp_path/tree)]
                done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=os.environ | {"PYTHONPATH": folder})
                assert done.returncode == 0, done.stderr
                spent[tree, stage].append(json.loads(done.stdout.splitlines()[-1]))

    benchmark.pedantic(one_round, rounds=rounds if benchmark.enabled else 1)
    least = {at: {k: min(x[k] for x in runs) for k in runs[0]} for at, runs in spent.items()}
    for (tree, stage), best in least.items():
        figures = {"s": round(best["wall"], 2), "cpu_s": round(best["cpu"], 2), "bytes_a_row": round(best["bytes"]/n)}
        benchmark.extra_info[f"{tree} {stage}"] = figures
        print(f"\n{n:,} pictures, {tree}, {stage}: {figures}", end="")
    for stage in ("build", "audit", "validate") if "there" in trees else ():
        for what in ("cpu", "bytes"):
            ratio = least["here", stage][what]/least["there", stage][what]
            print(f"\n{stage}, {what}: {ratio:.3f} of the other checkout", end="")
            assert ratio <= 1.1, (stage, what, ratio)
