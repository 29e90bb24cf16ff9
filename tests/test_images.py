"Cache, augmentation and loaders: properties, second implementations, and faults that a notebook can't show."
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fer_nb import augment, images, runs
from fer_nb.artifacts import CLASSES, ArtifactError, Box, FerError, GateError, UsageError, sha256_bytes
from fer_nb.augment import Augment, augment_faces, batch_generator, draw_augment, normalise_unit, unit_batch
from fer_nb.geometry import Geometry, normalise, prepare_face, prepare_pixels
from fer_nb.images import load_cache
from fer_nb.loading import FaceBatches, LazyFaces, PackedFaces, check_sizes, epoch_order, eval_loader, make_loaders
from fer_nb.records import CacheIndex
from tests.conftest import picture

G = Geometry(size=32)
pack_cache = partial(images.pack_cache, sample=0)  # what detectors say of it is no matter here


def manifest_of(folder, pictures, name="test"):
    "What `pack_cache` needs of a manifest, over pictures written to a folder."
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for i, image in enumerate(pictures):
        data = cv2.imencode(".png", image)[1].tobytes()
        (folder / f"{i}.png").write_bytes(data)
        rows.append((f"{name}/{i}.png", str(folder / f"{i}.png"), CLASSES[i % 7], "train", "expw", sha256_bytes(data), None))
    df = pd.DataFrame(rows, columns=["id", "path", "label", "split", "source", "sha256", "box"])
    return SimpleNamespace(df=df, dataset_index_id=f"{name}-{images.row_hash(df)[:12]}", view=lambda: df)


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    "A manifest of 150 grey pictures and its cache."
    folder = tmp_path_factory.mktemp("packed")
    manifest = manifest_of(folder / "faces", [picture(i) for i in range(150)])
    return SimpleNamespace(manifest=manifest, cache=pack_cache(manifest, G, folder / "cache"), folder=folder)


@pytest.fixture
def broken(packed, tmp_path):
    "A copy of the cache, to be damaged."
    return shutil.copytree(packed.cache.folder, tmp_path / "cache")


# cache

def test_cache_holds_the_prepared_faces(packed):
    rows = list(packed.manifest.df.itertuples())
    for i in (0, 77, 149): assert np.array_equal(packed.cache.images[i], prepare_pixels(picture(i), G))
    assert packed.cache.index.n == len(rows) and packed.cache.index.dataset_index_id == packed.manifest.dataset_index_id
    load_cache(packed.cache.folder, packed.manifest, G, full=True)


def test_packing_twice_gives_the_same_bytes(packed, tmp_path):
    again = pack_cache(packed.manifest, G, tmp_path / "again", threads=3)
    for name in images.CACHE_FILES: assert (again.folder / name).read_bytes() == (packed.cache.folder / name).read_bytes()


@pytest.mark.parametrize("at", [0, 140, 299])
def test_one_colour_picture_makes_the_cache_rgb(tmp_path, at):
    pictures = [picture(i, colour=i == at) for i in range(300)]
    cache = pack_cache(manifest_of(tmp_path / "faces", pictures), G, tmp_path / "cache", threads=2)
    assert cache.images.shape == (300, 32, 32, 3) and sorted(p.name for p in cache.folder.iterdir()) == sorted(images.CACHE_FILES)
    for i in (0, 139, 140, 299): assert np.array_equal(cache.images[i], prepare_face(pictures[i], G))


def test_boxes_of_the_manifest_are_used(tmp_path):
    manifest = manifest_of(tmp_path / "faces", [picture(i) for i in range(3)])
    manifest.df["box"] = [[4.0, 5.0, 20.0, 22.0], None, [0.0, 0.0, 9.0, 9.0]]
    manifest.df.to_parquet(tmp_path / "m.parquet")
    cache = pack_cache(manifest, G, tmp_path / "cache", rows=pd.read_parquet(tmp_path / "m.parquet"))
    assert np.array_equal(cache.images[0], prepare_pixels(picture(0), G, Box(4, 5, 20, 22)))
    assert np.array_equal(cache.images[1], prepare_pixels(picture(1), G))


def test_members_of_a_zip(tmp_path, packed):
    with zipfile.ZipFile(tmp_path / "faces.zip", "w") as z:
        for p in packed.manifest.df.path: z.write(p, os.path.basename(p))
    rows = packed.manifest.df.assign(path=[f"{tmp_path}/faces.zip!{os.path.basename(p)}" for p in packed.manifest.df.path])
    cache = pack_cache(packed.manifest, G, tmp_path / "cache", rows, threads=4)
    assert cache.index.images_sha256 == packed.cache.index.images_sha256


def test_normalisation_shares_the_cache_and_another_geometry_replaces_it(tmp_path):
    manifest = manifest_of(tmp_path / "faces", [picture(i) for i in range(20)])
    first = pack_cache(manifest, G, tmp_path / "cache")
    stamp = (first.folder / "images.npy").stat().st_mtime_ns
    other = G.model_copy(update={"mean": (0.5, 0.5, 0.5)})
    seen = other.model_copy(update={"grey": True})  # all these pictures are
    assert pack_cache(manifest, other, tmp_path / "cache").geometry == seen
    assert load_cache(tmp_path / "cache", geometry=other).geometry == seen
    assert (first.folder / "images.npy").stat().st_mtime_ns == stamp
    assert pack_cache(manifest, Geometry(size=16), tmp_path / "cache").images.shape == (20, 16, 16)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["cache", "faces"]


@pytest.mark.parametrize("damage, message", [
    (lambda d: os.truncate(d / "images.npy", 5000), "images.npy: is truncated or foreign.*got 5000"),
    (lambda d: os.truncate(d / "images.npy", 0), "images.npy: is truncated or foreign"),
    (lambda d: np.save(d / "images.npy", np.zeros((150, 32, 8), np.float32)), "images.npy: holds another array"),
    (lambda d: (d / "images.npy").write_bytes(b"x" * (d / "images.npy").stat().st_size), "images.npy: is not an npy file"),
    (lambda d: (d / "images.npy").unlink(), "images.npy: is missing"),
    (lambda d: (d / "rows.parquet").unlink(), "rows.parquet: is missing"),
    (lambda d: pd.read_parquet(d / "rows.parquet").iloc[1:].to_parquet(d / "rows.parquet"), "rows.parquet: was changed"),
    (lambda d: os.truncate(d / "cache_index.json", 60), "cache_index.json: is not whole JSON"),
    (lambda d: (d / "cache_index.json").unlink(), "cache_index.json: is missing"),
])
def test_a_damaged_cache_is_refused_and_packed_again(broken, packed, damage, message):
    damage(broken)
    with pytest.raises(ArtifactError, match=message): load_cache(broken)
    assert pack_cache(packed.manifest, G, broken).index == packed.cache.index


def test_an_index_with_another_geometry_written_into_it_is_refused(broken):
    index = CacheIndex.load(broken)
    index.geometry["interpolation"] = "linear-linear"
    index.save(broken)
    with pytest.raises(ArtifactError, match="geometry_hash"): load_cache(broken)


def test_one_changed_pixel_is_found_when_the_cache_is_opened(broken, packed):
    with open(broken / "images.npy", "rb+") as f:
        f.seek(5000)
        byte = f.read(1)
        f.seek(5000)
        f.write(bytes([byte[0] ^ 1]))
    load_cache(broken, full=False)
    with pytest.raises(ArtifactError, match="images.npy: was changed after it was packed"): load_cache(broken)
    assert load_cache(pack_cache(packed.manifest, G, broken).folder).index == packed.cache.index, "packed again, not found up to date"


def test_cache_and_manifest_must_belong_together(packed, tmp_path):
    other = manifest_of(tmp_path / "other", [picture(i + 900) for i in range(150)])
    with pytest.raises(ArtifactError, match="belongs to another manifest"): load_cache(packed.cache.folder, other)
    with pytest.raises(ArtifactError, match="other content in 150 of 150"): PackedFaces(packed.cache, other.df)
    more = manifest_of(tmp_path / "more", [picture(i) for i in range(151)])
    with pytest.raises(ArtifactError, match=r"test/150.png.*no image for 1 of 151 rows"): PackedFaces(packed.cache, more.df)


def test_rows_join_by_id_not_by_position(packed):
    shuffled = packed.manifest.df.sample(frac=1, random_state=3)
    faces = PackedFaces(packed.cache, shuffled)
    assert np.array_equal(faces.gather([0, 5])[1], prepare_pixels(picture(int(shuffled.index[5])), G))
    assert [CLASSES[c] for c in faces.labels] == list(shuffled.label)


def test_a_picture_replaced_by_text_stops_packing_and_leaves_nothing(tmp_path):
    manifest = manifest_of(tmp_path / "faces", [picture(i) for i in range(300)])
    (tmp_path / "faces" / "250.png").write_text("hello")
    with pytest.raises(ArtifactError, match="250.png: is not the file"): pack_cache(manifest, G, tmp_path / "cache")
    manifest.df.loc[250, "sha256"] = sha256_bytes(b"hello")
    with pytest.raises(FerError, match="250.png.*not a whole image"): pack_cache(manifest, G, tmp_path / "cache")
    (tmp_path / "faces" / "250.png").unlink()
    with pytest.raises(ArtifactError, match="250.png: is missing"): pack_cache(manifest, G, tmp_path / "cache")
    assert [p.name for p in tmp_path.iterdir()] == ["faces"]


@pytest.mark.parametrize("fill", [lambda d: (d / "notes.txt").write_text("mine"), lambda d: (d / "sub").mkdir()])
def test_a_folder_with_other_things_is_left_alone(packed, tmp_path, fill):
    fill(tmp_path)
    with pytest.raises(UsageError, match="holds other things"): pack_cache(packed.manifest, G, tmp_path)
    assert len(list(tmp_path.iterdir())) == 1


def test_views_that_cannot_be_packed(packed, tmp_path):
    df = packed.manifest.df
    with pytest.raises(UsageError, match="the view is empty"): pack_cache(packed.manifest, G, tmp_path / "c", df[:0])
    with pytest.raises(UsageError, match="stands twice"): pack_cache(packed.manifest, G, tmp_path / "c", pd.concat([df, df[:1]]))


def test_two_runs_that_pack_at_once(packed, tmp_path):
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: pack_cache(packed.manifest, G, tmp_path / "cache", threads=1), range(4)))
    assert {c.index.images_sha256 for c in made} == {packed.cache.index.images_sha256}
    load_cache(tmp_path / "cache", packed.manifest, G, full=True)
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process the POSIX way")
def test_killed_while_packing_leaves_no_cache(packed, tmp_path):
    packed.manifest.df.to_parquet(tmp_path / "rows.parquet")
    code = f"""if True:
        import pandas as pd, time
        from types import SimpleNamespace
        from fer_nb import images
        prepare = images.prepare_row
        def slow(row, *args):
            if row.id.endswith("/140.png"): print("midway", flush=True); time.sleep(60)
            return prepare(row, *args)
        images.prepare_row = slow
        m = SimpleNamespace(dataset_index_id="x", view=lambda: pd.read_parquet({str(tmp_path / "rows.parquet")!r}))
        images.pack_cache(m, images.Geometry(size=32), {str(tmp_path / "cache")!r}, threads=1, sample=0)"""
    child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline().strip() == "midway"
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert not (tmp_path / "cache").exists()
    assert pack_cache(packed.manifest, G, tmp_path / "cache").index == packed.cache.index


# augmentation

def test_each_sample_is_augmented_by_itself():
    x = unit_batch(torch.from_numpy(np.stack([picture(i, 32) for i in range(12)])))
    params = draw_augment(Augment(erase=0.7), 12, batch_generator(1, 2, 3))
    whole = augment_faces(x.clone(), params)
    for i in range(12):
        alone = augment_faces(x[i:i + 1].clone(), augment.AugmentParams(*(p[i:i + 1] for p in params)))
        assert torch.equal(alone[0], whole[i])


def test_grey_and_rgb_batches_give_the_same_pixels():
    grey = torch.from_numpy(np.stack([picture(i, 32) for i in range(8)]))
    params = draw_augment(Augment(), 8, batch_generator(4))
    one, three = (augment_faces(unit_batch(f), params) for f in (grey, grey[..., None].repeat(1, 1, 1, 3)))
    assert torch.equal(one.expand(-1, 3, -1, -1), three)


@pytest.mark.parametrize("angle, zoom, dx, dy", [(20, 1.0, 0, 0), (-30, 1.2, 3, -2), (0, 0.8, -4, 5)])
def test_the_warp_is_the_affine_map_that_opencv_makes(angle, zoom, dx, dy):
    face = cv2.GaussianBlur(picture(7, 64), (0, 0), 2)
    u = torch.tensor([[angle / 90, (zoom - 1) / 0.5, dx / 64, dy / 64]])
    theta = augment._thetas(Augment(rotate=90, scale=0.5, translate=1), u)
    still = [torch.zeros(1, dtype=torch.long), theta, torch.ones(1), torch.zeros(1), torch.zeros(1, 4), torch.zeros(1)]
    got = augment_faces(unit_batch(torch.from_numpy(face)[None]), augment.AugmentParams(*still))[0, 0].numpy() * 255
    t = theta[0].double().numpy()
    at = t[:, :2] @ (np.array([[1], [1]]) - 64) / 64 + t[:, 2:]  # the grid's first pixel, in -1..1
    inverse = np.hstack([t[:, :2], (at * 64 + 63) / 2])  # from output to input pixels, whole numbers at pixel centres
    want = cv2.warpAffine(face.astype(np.float32), inverse, (64, 64), flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP,
                          borderMode=cv2.BORDER_REPLICATE)
    assert np.abs(got - want).max() < 1.5 and np.abs(got - want).mean() < 0.1
    assert np.abs(got - face).mean() > 2


def test_strengths_and_frequencies():
    augment, n = Augment(flip=0.3, erase=0.2), 20_000
    p = draw_augment(augment, n, batch_generator(11))
    assert abs(p.view.float().mean() - 0.3) < 0.015 and abs((p.patch[:, 2] > 0).float().mean() - 0.2) < 0.015
    angle = torch.rad2deg(torch.atan2(p.theta[:, 1, 0], p.theta[:, 0, 0]))
    assert angle.abs().max() <= 12.001 and angle.std() > 6
    assert (p.gain - 1).abs().max() <= 0.2 and p.offset.abs().max() <= 0.15
    low, high = p.patch[:, :2] - p.patch[:, 2:] / 2, p.patch[:, :2] + p.patch[:, 2:] / 2
    assert low.min() > -1e-6 and high.max() < 1 + 1e-6
    names = ["flip", "angle", "zoom", "gain", "offset"]
    table = np.stack([p.view, angle, p.theta[:, 0, :2].norm(dim=1), p.gain, p.offset])
    corr = np.corrcoef(table) - np.eye(len(names))
    assert np.abs(corr).max() < 0.03  # drawn independently of each other


def test_pixels_do_not_depend_on_threads_nor_on_what_came_before(packed):
    faces = PackedFaces(packed.cache, packed.manifest.df)
    first = FaceBatches(faces, 32, train=True, seed=5, augment=Augment())
    first.set_epoch(2)
    want = [t.clone() for t in first.batch(3)]
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            torch.manual_seed(threads)
            np.random.seed(threads)
            loader = FaceBatches(faces, 32, train=True, seed=5, augment=Augment())
            loader.batch(0)
            loader.set_epoch(2)
            assert all(torch.equal(a, b) for a, b in zip(loader.batch(3), want))
            assert torch.get_num_threads() == threads
    finally: torch.set_num_threads(before)


def test_seed_epoch_and_batch_each_change_the_augmentation(packed):
    views = set()
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (2, 1), (0, 1)):
        loader = FaceBatches(PackedFaces(packed.cache, packed.manifest.df), 64, train=True, seed=seed, augment=Augment())
        loader.set_epoch(epoch)
        views |= {tuple(batch[3].tolist()) for batch in loader}
    assert len(views) == 10


def test_the_global_generators_are_not_touched(packed):
    loader = FaceBatches(PackedFaces(packed.cache, packed.manifest.df), 32, train=True, augment=Augment(), balanced=True)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for _ in loader: pass
    assert torch.equal(state, torch.get_rng_state())


# order and loaders

@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 6), min_size=1, max_size=200), st.integers(0, 2**31), st.integers(0, 1000))
def test_orders(labels, seed, epoch):
    labels = np.array(labels)
    assert np.array_equal(np.sort(epoch_order(labels, seed, epoch)), np.arange(len(labels)))
    order = epoch_order(labels, seed, epoch, balanced=True)
    assert len(order) == len(labels) and np.array_equal(order, epoch_order(labels, seed, epoch, balanced=True))
    seen = np.bincount(labels[order], minlength=7)[np.unique(labels)]
    assert np.ptp(seen) <= 1
    for c in np.unique(labels):
        visits = np.bincount(order, minlength=len(labels))[labels == c]
        assert np.ptp(visits) <= 1  # no row again before all of its class had their turn


def test_a_training_epoch_visits_each_row_once_and_leaves_the_last_part_out(packed):
    loader = FaceBatches(PackedFaces(packed.cache, packed.manifest.df), 32, train=True, augment=Augment())
    index = torch.cat([b[2] for b in loader])
    assert len(loader) == 4 and len(index) == 128 == len(index.unique())
    small = FaceBatches(PackedFaces(packed.cache, packed.manifest.df[:10]), 32, train=True)
    assert [len(b[0]) for b in small] == [10]


def test_labels_views_and_pixels_of_a_batch_belong_together(packed):
    faces = PackedFaces(packed.cache, packed.manifest.df)
    still = Augment(rotate=0, scale=0, translate=0, brightness=0, contrast=0, erase=0)
    x, y, index, view = FaceBatches(faces, 64, train=True, augment=still).batch(1)
    assert 10 < view.sum() < 54
    for i in range(64):
        plain = normalise(prepare_pixels(picture(int(index[i])), G), G)[0]
        want = plain[..., ::-1] if view[i] else plain
        assert np.abs(x[i].numpy() - want).max() < 1e-4
        assert y[i] == int(index[i]) % 7


@pytest.mark.parametrize("kind", ["packed", "lazy"])
def test_worker_processes_give_the_same_batches(packed, kind):
    rows = packed.manifest.df
    faces = PackedFaces(packed.cache, rows) if kind == "packed" else LazyFaces(rows, G)
    here, there = (FaceBatches(faces, 40, train=True, augment=Augment(), num_workers=n) for n in (0, 2))
    for loader in (here, there): loader.set_epoch(3, start_batch=1)
    pairs = list(zip(here, there, strict=True))
    assert len(pairs) == 2 and all(torch.equal(a, b) for p in pairs for a, b in zip(*p))


def test_pickles_small_and_works_after(packed):
    loader = FaceBatches(PackedFaces(packed.cache, packed.manifest.df), 32, train=True, augment=Augment())
    want = loader.batch(0)
    data = pickle.dumps(loader)
    assert len(data) < 150_000 < packed.cache.images.nbytes
    assert all(torch.equal(a, b) for a, b in zip(pickle.loads(data).batch(0), want))


def test_resume_is_used_up_by_one_iteration(packed):
    loader = FaceBatches(PackedFaces(packed.cache, packed.manifest.df), 32, train=True, augment=Augment())
    whole = list(loader)
    loader.set_epoch(0, start_batch=3)
    rest, again = list(loader), list(loader)
    assert len(rest) == 1 and torch.equal(rest[0][0], whole[3][0]) and len(again) == 4


def test_processes_share_an_epoch(packed):
    faces = PackedFaces(packed.cache, packed.manifest.df)
    whole = list(FaceBatches(faces, 16, train=True, augment=Augment()))
    parts = [list(FaceBatches(faces, 16, train=True, augment=Augment(), rank=r, world_size=3)) for r in range(3)]
    assert [len(p) for p in parts] == [3, 3, 3]
    for r, part in enumerate(parts):
        for k, batch in enumerate(part): assert torch.equal(batch[0], whole[3 * k + r][0])
    with pytest.raises(UsageError, match="too few for 20 processes"): FaceBatches(faces, 64, train=True, rank=1, world_size=20)


def test_evaluation_is_fixed_whole_and_never_augmented(packed):
    faces = PackedFaces(packed.cache, packed.manifest.df)
    loader = eval_loader(faces, batch_size=64)
    loader.set_epoch(9)
    assert torch.equal(torch.cat([b[2] for b in loader]), torch.arange(150))
    plain, flipped = (torch.cat([b[0] for b in eval_loader(faces, view=v)]) for v in (0, 1))
    direct = normalise_unit(unit_batch(torch.from_numpy(np.array(packed.cache.images))), G)
    assert torch.equal(plain, direct) and torch.equal(flipped, plain.flip(-1))


@pytest.mark.parametrize("bad, message", [({"batch_size": 0}, "batch_size"), ({"view": 2}, "view must be 0"),
                                          ({"rank": 3}, "rank must be in 0..0")])
def test_wrong_arguments(packed, bad, message):
    with pytest.raises(UsageError, match=message): FaceBatches(PackedFaces(packed.cache, packed.manifest.df), **bad)


@pytest.mark.parametrize(("wrong", "says"), [
    ({"erased": 0.5}, "augment.erased is no change that is known: did you mean erase"),
    ({"blurring": 1}, "known: give some of flip, rotate"), ({"flip": 2}, "augment.flip is 2: Input should be less"),
    ({"erase_area": [0.5, 0.1]}, "the smaller first"),
    ({"erase_area": [-1, 0.1]}, "the smaller first"), ({"erase_area": [0.1]}, "augment.erase_area is"), ({1: 2}, "augment.1 is no change")])
def test_a_change_of_the_augmentation_that_is_none_is_refused_in_a_sentence(wrong, says):
    with pytest.raises(UsageError) as e: augment.changed_augment(wrong)
    assert says in str(e.value) and "pydantic" not in str(e.value) and "\n" not in str(e.value)
    assert tuple(Augment.model_fields) == runs.CHANGES  # what the command line knows without torch


def test_a_size_that_no_epoch_reaches_is_refused():
    assert check_sizes([[0, 24], [20, 32]], 32, 21) == check_sizes([[0, 24], [20, 32]], 32) == ((0, 24), (20, 32))
    for epochs in (1, 20):
        with pytest.raises(UsageError, match=f"sizes begin 32 px with epoch 20, and there are only {epochs} epochs"):
            check_sizes([[0, 24], [20, 32]], 32, epochs)
    assert check_sizes([], 32, 1) == ()


def test_training_and_validation_share_one_geometry(packed):
    train, valid = PackedFaces(packed.cache, packed.manifest.df), LazyFaces(packed.manifest.df, Geometry(size=48))
    with pytest.raises(GateError, match="size: expected 32, got 48"): make_loaders(train, valid)


def test_fastai_takes_the_loaders(packed):
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner
    faces = PackedFaces(packed.cache, packed.manifest.df)
    pair = make_loaders(faces, faces, batch_size=50, num_workers=0)
    dls = DataLoaders(pair.train, pair.valid, device=torch.device("cpu"))
    seen = []
    def loss(pred, y, index, view):
        seen.append((len(y), int(view.max())))
        return torch.nn.functional.cross_entropy(pred, y)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 7))
    learn = Learner(dls, model, loss_func=loss)
    with learn.no_logging(): learn.fit(1)
    assert seen == [(50, 1)] * 3 + [(100, 0), (50, 0)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_the_gpu_gets_the_same_parameters(packed):
    faces = PackedFaces(packed.cache, packed.manifest.df)
    here, there = (FaceBatches(faces, 50, train=True, augment=Augment(), device=d).batch(1) for d in ("cpu", "cuda"))
    assert all(torch.equal(a, b.cpu()) for a, b in zip(here[1:], there[1:]))
    off = (here[0] - there[0].cpu()).abs()
    assert off.median() < 1e-5 and (off > 1e-3).float().mean() < 1e-3  # the edge of an erased patch may fall one pixel elsewhere


# real images

def test_real_faces_pack_and_load(real_data, tmp_path):
    archive = real_data / "fer2013.zip"
    with zipfile.ZipFile(archive) as z:
        names = [n for n in z.namelist() if n.endswith(".jpg")][::200]
        rows = pd.DataFrame({"id": names, "path": [f"{archive}!{n}" for n in names],
                             "split": "train", "source": "fer2013", "label": [os.path.basename(os.path.dirname(n)).title() for n in names],
                             "sha256": [sha256_bytes(z.read(n)) for n in names]})
    cache = pack_cache(SimpleNamespace(dataset_index_id="real", view=lambda: rows), Geometry(size=48), tmp_path / "cache")
    assert len(rows) > 150 and cache.images.shape == (len(rows), 48, 48)
    packed, lazy = (eval_loader(d).one_batch() for d in (PackedFaces(cache, rows), LazyFaces(rows, cache.geometry)))
    assert torch.equal(packed[0], lazy[0]) and set(packed[1].tolist()) <= set(range(7))
    assert json.loads((tmp_path / "cache" / "cache_index.json").read_text())["shape"] == [len(rows), 48, 48]
