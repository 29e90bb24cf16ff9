"""How fast images are packed and loaded. The floor asserted here is what training needs, with room for a busy machine.

Run: pytest tests/benchmarks/test_bench_images.py --benchmark-only
"""
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest

from fer_nb.artifacts import CLASSES, sha256_bytes
from fer_nb.augment import Augment
from fer_nb.geometry import Geometry
from fer_nb.images import pack_cache, row_hash
from fer_nb.loading import FaceBatches, PackedFaces, eval_loader

N = 2048
GEOMETRY = Geometry(size=64)


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    "2,048 grey PNG files of 48 px, about as large on disk as FER2013's."
    folder, rows = tmp_path_factory.mktemp("faces"), []
    rng = np.random.default_rng(0)
    for i in range(N):
        image = cv2.GaussianBlur(rng.integers(0, 256, (48, 48), dtype=np.uint8), (0, 0), 1.5)
        data = cv2.imencode(".png", cv2.normalize(image, None, 0, 255, cv2.NORM_MINMAX))[1].tobytes()
        (folder / f"{i}.png").write_bytes(data)
        rows.append((f"bench/{i}.png", str(folder / f"{i}.png"), CLASSES[i % 7], sha256_bytes(data)))
    df = pd.DataFrame(rows, columns=["id", "path", "label", "sha256"])
    return SimpleNamespace(df=df, dataset_index_id=f"bench-{row_hash(df)[:12]}", view=lambda: df)


@pytest.fixture(scope="module")
def faces(manifest, tmp_path_factory):
    return PackedFaces(pack_cache(manifest, GEOMETRY, tmp_path_factory.mktemp("cache") / "c"), manifest.df)


def consume(loader):
    n = 0
    for batch in loader: n += len(batch[0])
    return n


def rate(benchmark, n: int) -> float:
    "Images a second, by the median round; it stands in the benchmark's extra_info too."
    benchmark.extra_info["images_per_second"] = value = round(n / benchmark.stats.stats.median)
    return value


def test_pack_cache(benchmark, manifest, tmp_path):
    folders = iter(tmp_path / str(i) for i in range(100))
    cache = benchmark.pedantic(lambda: pack_cache(manifest, GEOMETRY, next(folders), progress=False), rounds=5)
    assert len(cache) == N
    if benchmark.enabled: assert rate(benchmark, N) > 1000


@pytest.mark.parametrize("batch_size", [32, 128])
def test_training_loader_64px(benchmark, faces, batch_size):
    loader = FaceBatches(faces, batch_size, train=True, augment=Augment(), balanced=True)
    assert benchmark.pedantic(consume, (loader,), rounds=8, warmup_rounds=1) == N
    if benchmark.enabled: assert rate(benchmark, N) > 3000  # 5% of an epoch at 140 trained images/s asks for 2,800


def test_evaluation_loader_64px(benchmark, faces):
    assert benchmark.pedantic(consume, (eval_loader(faces, batch_size=128),), rounds=8, warmup_rounds=1) == N
    if benchmark.enabled: assert rate(benchmark, N) > 10_000
