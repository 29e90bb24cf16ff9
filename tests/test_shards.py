"""Validation in shards on the command line: any cut merges to the same bytes, and parts that don't belong together are refused."""
import cv2
import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression

from fer_nb import callbacks, integrity, training
from fer_nb.artifacts import CLASSES, read_npz
from fer_nb.cli import main
from fer_nb.loading import eval_loader
from fer_nb.records import Calibration
from fer_nb.shards import Shard, shard_of
from fer_nb.synthetic import write_dataset
from fer_nb.teachers import Teacher


@pytest.fixture()
def manifest(tmp_path):
    write_dataset(tmp_path/"faces", n=60, size=32)
    assert main(["manifest", "build", "--source", f"synthetic={tmp_path/'faces'}", "--out", str(tmp_path/"m")]) == 0
    assert main(["manifest", "validate", str(tmp_path/"m")]) == 0
    return tmp_path/"m"


@pytest.mark.parametrize("n", [1, 3, 7, 100])
def test_any_cut_merges_to_the_same_bytes(manifest, n, capsys):
    report = manifest/"manifest_validation.json"
    whole = report.read_bytes()
    report.unlink()
    for k in sorted(range(1, n + 1), key=lambda k: -k): assert main(["manifest", "validate", str(manifest), "--shard", f"{k}/{n}"]) == 0
    assert not report.exists()  # half a validation never looks like one
    assert main(["manifest", "validate", str(manifest), "--merge"]) == 0
    assert report.read_bytes() == whole and not (manifest/"shards").exists()


def test_a_changed_picture_is_found_in_whichever_shard_it_lies(manifest, capsys):
    picture = sorted((manifest.parent/"faces").rglob("*.png"))[-1]
    cv2.imwrite(str(picture), np.zeros((32, 32, 3), np.uint8))
    assert main(["manifest", "validate", str(manifest)]) == 1
    whole = (manifest/"manifest_validation.json").read_bytes()
    for k in (1, 2, 3): main(["manifest", "validate", str(manifest), "--shard", f"{k}/3"])
    assert main(["manifest", "validate", str(manifest), "--merge"]) == 1
    assert picture.name in capsys.readouterr().err and (manifest/"manifest_validation.json").read_bytes() == whole


def test_wrong_shards_end_in_one_line(manifest, capsys):
    for line in (["--shard", "0/3"], ["--shard", "4/3"], ["--shard", "x"], ["--shard", "1/3", "--merge"], ["--merge", "--sample", "5"]):
        assert main(["manifest", "validate", str(manifest), *line]) == 2
    assert main(["manifest", "validate", str(manifest), "--merge"]) == 1
    assert "run fer-nb manifest validate" in capsys.readouterr().err
    main(["manifest", "validate", str(manifest), "--shard", "1/2"])
    assert main(["manifest", "validate", str(manifest), "--merge"]) == 1
    assert "1 of 2 shards are missing" in capsys.readouterr().err


def test_parts_cover_all_rows_once():
    for count in (0, 1, 5, 1000):
        for n in (1, 2, 3, 7, 12):
            parts = [range(count)[Shard(k, n).part(count)] for k in range(1, n + 1)]
            assert [i for p in parts for i in p] == list(range(count))
            assert max(map(len, parts)) - min(map(len, parts)) <= 1
    assert shard_of("2/3") == Shard(2, 3)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    "What somebody keeps of a teacher: best.pt and args.json, without checkpoint_last.pt; and its manifest and cache, moved elsewhere."
    d = tmp_path_factory.mktemp("kept")
    where = training.embedded_data(d/"data", n=140, img_size=32)
    data, run = training.open_data(*where), d/"teacher"
    settings = dict(manifest_dir="M/manifests", cache_dir="M/cache", train_view="hq_train", train_source="", arch="test_resnet", stage="A",
                    seed=7, folds=3, fold=1, epochs=2, weights="gone.pth", weights_loaded="gone.pth")
    integrity.write_provenance(run, "teacher", settings, 7, training.training_environment("cpu"))
    callbacks.seed_everything(7)
    teacher = Teacher("test_resnet").eval()  # which knows something: a classifier fitted to random features
    (x, y), (xv, yv) = (training.predict(teacher.backbone, eval_loader(part))[:2] for part in (data.train, data.val))
    x = np.concatenate([x, xv])
    fitted = LogisticRegression(C=10, fit_intercept=False, max_iter=2000).fit(x/np.linalg.norm(x, axis=1, keepdims=True), [*y, *yv])
    teacher.head.weight.data = torch.from_numpy(fitted.coef_).float()
    callbacks.save_checkpoint(run/"best.pt", model=teacher.state_dict(), meta={
        "classes": list(CLASSES), "backbone": "test_resnet", "head": "arcface", "stage": "A", "geometry": data.geometry.to_dict(),
        "dataset_index_id": data.dataset_index_id})
    return run, data, [str(w) for w in where]


def test_a_teacher_is_exported_and_never_trained(kept, capsys):
    run, data, (manifest, cache) = kept
    before = {p.name: p.read_bytes() for p in run.iterdir()}
    assert main(["teacher", "export", str(run)]) == 2 and "'M/manifests' does not exist: give --manifest" in capsys.readouterr().err
    assert main(["teacher", "export", str(run), "--manifest", manifest, "--cache", cache]) == 0
    assert {name: (run/name).read_bytes() for name in before} == before  # weights and settings
    soft = read_npz(run/"softlabels"/"softlabels.npz")
    assert len(soft["ids"]) == len(data.train) + len(data.val) + len(data.test)
    assert Calibration.load(run).model_name == "test_resnet stage A seed 7" and (run/"hash_manifest.json").is_file()
    assert set(read_npz(run/"out_of_fold.npz")["ids"]) < set(data.train.rows["id"])  # the fold that it left out
    assert not (run/"history.csv").exists() and not (run/"checkpoint_last.pt").exists()


def test_an_export_without_weights_or_of_another_dataset_is_refused(kept, tmp_path, capsys):
    run, _, where = kept
    other = training.embedded_data(tmp_path/"other", n=70, img_size=32, seed=3)
    before = {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()}
    assert main(["teacher", "export", str(run), "--manifest", str(other[0]), "--cache", str(other[1])]) == 1
    assert "give its own manifest" in capsys.readouterr().err
    assert {p.name: p.read_bytes() for p in run.iterdir() if p.is_file()} == before
    (tmp_path/"empty").mkdir()
    (tmp_path/"empty"/"args.json").write_bytes((run/"args.json").read_bytes())
    for more in ([], ["--shard", "1/2"]):
        assert main(["teacher", "export", str(tmp_path/"empty"), "--manifest", where[0], "--cache", where[1], *more]) == 1
        assert "best.pt is missing" in capsys.readouterr().err
    assert [p.name for p in (tmp_path/"empty").iterdir()] == ["args.json"]
