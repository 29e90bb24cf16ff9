"""Manifests: adapters on small trees in the datasets' documented layouts, tampering, properties, and the real zips."""
import csv
import shutil
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fer_nb.archives import decode, read_bytes
from fer_nb.artifacts import CLASSES, ArtifactError, FerError, GateError, UsageError
from fer_nb.audit import audit_manifest, validate_manifest
from fer_nb.leaves import seal_folder
from fer_nb.likeness import coefficients, find_groups, fingerprint, hamming_pairs, perceptual_hashes, pixel_hash
from fer_nb.manifests import VIEWS, assign_splits, build_manifest, dataset_fingerprint, load_manifest
from fer_nb.records import LeakageReport, ManifestValidation
from fer_nb.sources import ADAPTERS, ferplus_label, read_source

QUICK = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def picture(seed, size=48):
    return cv2.resize(np.random.default_rng(seed).integers(0, 256, (5, 5), dtype=np.uint8), (size, size), interpolation=cv2.INTER_CUBIC)


def encode(image, kind=".png"): return cv2.imencode(kind, image)[1].tobytes()


def put(path, seed=None, kind=None, data=None):
    "Write a random picture (or bytes) to a path, making its folders."
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(encode(picture(seed), kind or path.suffix) if data is None else data)


def zipped(folder, target, top=""):
    with zipfile.ZipFile(target, "w") as z:
        for f in sorted(Path(folder).rglob("*")):
            if f.is_file(): z.write(f, f"{top}{f.relative_to(folder).as_posix()}")
    return target


def labels(df): return dict(zip(df.id, df.label))


def build(sources, out, **kwargs): return build_manifest([str(s) for s in sources], out, progress=False, **kwargs).manifest


# --- adapters ---------------------------------------------------------------------------------------------------------

@pytest.fixture
def kaggle(tmp_path):
    "FER2013 as on Kaggle: 5 pictures a class in train, public and private tests."
    root = tmp_path / "kaggle"
    for k, c in enumerate(CLASSES):
        for i in range(5): put(root / f"train/{c.lower()}/Training_{k}{i}.jpg", 100 * k + i)
        put(root / f"test/{c.lower()}/PublicTest_{k}.jpg", 100 * k + 50)
        put(root / f"test/{c.lower()}/PrivateTest_{k}.jpg", 100 * k + 60)
    return root


def test_fer2013_folder_zip_and_nested_folder_give_the_same_dataset(kaggle, tmp_path):
    a = build([f"fer2013_folder={kaggle}"], tmp_path / "a")
    b = build([f"fer2013_folder={zipped(kaggle, tmp_path / 'k.zip', 'archive/fer2013/')}"], tmp_path / "b")
    shutil.copytree(kaggle, tmp_path / "outer/inner/fer2013")
    c = build([f"fer2013_folder={tmp_path / 'outer'}"], tmp_path / "c")
    assert a.dataset_index_id == b.dataset_index_id == c.dataset_index_id
    assert set(a.df.usage) == {"Training", "PublicTest", "PrivateTest"}
    assert a.df.id[0] == "fer2013/test/angry/PrivateTest_0.jpg"
    assert (a.df.split[a.df.usage != "Training"] == "test").all()
    assert len(a.view("test", usage="PrivateTest")) == 7
    assert "!archive/fer2013/test/" in b.df.path[0] and decode(read_bytes(b.df.path[0])).shape == (48, 48)


def write_fer_csv(path, rows, header=("emotion", "pixels", "Usage")):
    with open(path, "w", newline="") as f:
        w = csv.writer(f)
        w.writerow(header)
        w.writerows(rows)


def test_fer2013_csv(tmp_path):
    rows = [(k, " ".join(map(str, picture(k).ravel())), u) for k, u in enumerate(["Training"] * 5 + ["PublicTest", "PrivateTest"])]
    write_fer_csv(tmp_path / "fer2013.csv", rows)
    m = build([f"fer2013_csv={tmp_path / 'fer2013.csv'}"], tmp_path / "m", val_fraction=0)
    assert list(m.df.label) == list(CLASSES)
    assert list(m.df.split) == ["train"] * 5 + ["test"] * 2
    assert (decode(read_bytes(m.df.path[3])) == picture(3)).all()
    assert (m.df.width == 48).all()
    write_fer_csv(tmp_path / "icml_face_data.csv", [(e, u, p) for e, p, u in rows], ("emotion", " Usage", " pixels"))
    assert labels(read_source(f"fer2013_csv={tmp_path / 'icml_face_data.csv'}")) == {
        k.replace("fer2013.csv", "icml_face_data.csv"): v for k, v in labels(m.df).items()}


def test_fer2013_csv_keeps_a_row_with_broken_pixels(tmp_path):
    rows = [(k % 7, " ".join(map(str, picture(k).ravel())), "Training") for k in range(20)]
    rows[3] = (3, "1 2 3 x", "Training")
    rows[4] = (4, " ".join(["300"] * 2304), "Training")
    write_fer_csv(tmp_path / "fer2013.csv", rows)
    m = build([f"fer2013_csv={tmp_path}"], tmp_path / "m")
    assert list(m.df.excluded[3:5]) == ["broken file"] * 2 and len(m.df) == 20


@pytest.mark.parametrize("missing", ["pixels", "emotion", "Usage"])
def test_fer2013_csv_missing_column(tmp_path, missing):
    header = [h if h != missing else "other" for h in ("emotion", "pixels", "Usage")]
    write_fer_csv(tmp_path / "fer2013.csv", [(0, "1 2 3 4", "Training")], header)
    with pytest.raises(FerError, match=missing): build([f"fer2013_csv={tmp_path / 'fer2013.csv'}"], tmp_path / "m")


FERPLUS_HEAD = "Usage,Image name,neutral,happiness,surprise,sadness,anger,disgust,fear,contempt,unknown,NF"
FERPLUS = [
    ("Training", "fer0000000.png", (8, 0, 0, 1, 1, 0, 0, 0, 0, 0), "Neutral"),
    ("Training", "fer0000001.png", (0, 9, 1, 0, 0, 0, 0, 0, 0, 0), "Happy"),
    ("Training", "fer0000002.png", (0, 0, 0, 0, 2, 1, 0, 7, 0, 0), "unmapped label: contempt"),
    ("Training", "fer0000003.png", (1, 0, 0, 1, 0, 0, 0, 0, 8, 0), "unmapped label: unknown"),
    ("Training", "fer0000004.png", (0, 0, 5, 0, 0, 0, 5, 0, 0, 0), "tied votes"),
    ("Training", "fer0000005.png", (0, 0, 0, 0, 1, 0, 5, 0, 4, 0), "Fear"),
    ("Training", "", (0, 0, 0, 0, 0, 0, 0, 0, 0, 10), "not a face"),
    ("PublicTest", "fer0028638.png", (0, 0, 0, 2, 1, 7, 0, 0, 0, 0), "Disgust"),
    ("PrivateTest", "fer0032220.png", (0, 0, 9, 0, 1, 0, 0, 0, 0, 0), "Surprise"),
]
PART = {"Training": "FER2013Train", "PublicTest": "FER2013Valid", "PrivateTest": "FER2013Test"}


def ferplus_csv(path):
    lines = [FERPLUS_HEAD] + [",".join([u, n, *map(str, v)]) for u, n, v, _ in FERPLUS]
    put(path, data=("\r\n".join(lines) + "\r\n").encode("utf-8-sig"))


@pytest.fixture
def ferplus_tree(tmp_path):
    root = tmp_path / "ferplus"
    ferplus_csv(root / "fer2013new.csv")
    for k, (u, n, *_) in enumerate(FERPLUS):
        if n: put(root / "data" / PART[u] / n, k)
    return root


def said(df): return [x or c for x, c in zip(df.excluded, df.label)]


def test_ferplus_folders_and_zip(ferplus_tree, tmp_path):
    a = read_source(f"ferplus={ferplus_tree}")
    b = read_source(f"ferplus={zipped(ferplus_tree, tmp_path / 'f.zip', 'x/')}")
    assert labels(a) == labels(b) and len(a) == 8
    expected = {f"ferplus/{PART[u]}/{n}": what for u, n, _, what in FERPLUS if n}
    assert dict(zip(a.id, said(a))) == expected
    row = a[a.id == "ferplus/FER2013Train/fer0000005.png"].iloc[0]
    assert row.votes == (1, 0, 5, 0, 0, 0, 0) and row.usage == "FER2013Train"
    assert dict(zip(a.usage, a.split)) == {"FER2013Train": "train", "FER2013Valid": "test", "FER2013Test": "test"}


def test_ferplus_says_what_is_missing(ferplus_tree):
    shutil.rmtree(ferplus_tree / "data/FER2013Test")  # left out on purpose: no rows
    (ferplus_tree / "data/FER2013Train/fer0000001.png").unlink()  # lost: a row with a reason
    put(ferplus_tree / "data/FER2013Train/fer9999999.png", 77)  # nobody labelled it
    df = read_source(f"ferplus={ferplus_tree}").set_index("id")
    assert not any("FER2013Test" in i for i in df.index)
    assert df.excluded["ferplus/FER2013Train/fer0000001.png"] == "missing file"
    assert df.excluded["ferplus/FER2013Train/fer9999999.png"] == "no label in fer2013new.csv"
    assert len(df) == 8


def test_ferplus_with_pixels_from_fer2013_csv(tmp_path):
    ferplus_csv(tmp_path / "fer2013new.csv")
    write_fer_csv(tmp_path / "fer2013.csv", [(0, " ".join(map(str, picture(k).ravel())), u) for k, (u, *_) in enumerate(FERPLUS)])
    m = build([f"ferplus={tmp_path}"], tmp_path / "m")
    assert len(m.df) == 9
    what = dict(zip(m.df.id, said(m.df)))
    assert what["ferplus/FER2013Valid/fer0028638.png"] == "Disgust" and what["ferplus/FER2013Train/row000006.png"] == "not a face"
    at = m.df.set_index("id").path["ferplus/FER2013Test/fer0032220.png"]
    assert (decode(read_bytes(at)) == picture(8)).all()
    write_fer_csv(tmp_path / "fer2013.csv", [(0, "1 2 3 4", "Training")])
    with pytest.raises(UsageError, match="the same rows"): read_source(f"ferplus={tmp_path}")


def test_ferplus_csv_missing_column(ferplus_tree):
    f = ferplus_tree / "fer2013new.csv"
    f.write_bytes(f.read_bytes().replace(b"contempt", b"scorn"))
    with pytest.raises(UsageError, match="fer2013new.csv lacks the column 'contempt'"): read_source(f"ferplus={ferplus_tree}")


@given(st.lists(st.integers(0, 10), min_size=10, max_size=10))
def test_ferplus_label_is_the_strict_majority_among_the_seven(votes):
    label, reason = ferplus_label(votes)
    assert bool(label) != bool(reason)
    order = ("Neutral", "Happy", "Surprise", "Sad", "Angry", "Disgust", "Fear")
    best = max(votes)
    if label:
        assert votes[order.index(label)] == best and sum(v == best for v in votes[:7]) == 1
    elif reason == "tied votes":
        assert sum(v == best for v in votes[:7]) > 1


RAF = {1: "Surprise", 2: "Fear", 3: "Disgust", 4: "Happy", 5: "Sad", 6: "Angry", 7: "Neutral"}


@pytest.mark.parametrize("nested_zip", [False, True])
def test_rafdb_basic(tmp_path, nested_zip):
    root = tmp_path / "basic"
    names = [f"{p}_{i:05d}" for p in ("train", "test") for i in range(1, 8)]
    put(root / "EmoLabel/list_patition_label.txt", data="".join(f"{n}.jpg {int(n[-1])}\n" for n in names).encode())
    for k, n in enumerate(names): put(root / f"Image/aligned/{n}_aligned.jpg", k)
    put(root / "Image/original/train_00001.jpg", 900)  # the aligned picture wins
    if nested_zip:
        zipped(root / "Image/aligned", root / "Image/aligned.zip", "aligned/")
        shutil.rmtree(root / "Image/aligned")
    df = read_source(f"rafdb_basic={root}")
    assert labels(df) == {f"rafdb_basic/Image/aligned/{n}_aligned.jpg": RAF[int(n[-1])] for n in names}
    assert (df.split == df.usage).all() and (df.split == "test").sum() == 7
    assert (decode(read_bytes(df.path[df.id.str.contains("train_00001")].iloc[0])) == decode(encode(picture(0), ".jpg"))).all()


def test_rafdb_basic_in_numbered_folders(tmp_path):
    for k in range(1, 8):
        put(tmp_path / f"DATASET/train/{k}/train_{k}_aligned.jpg", k)
        put(tmp_path / f"DATASET/test/{k}/test_{k}_aligned.jpg", k + 50)
    df = read_source(f"rafdb_basic={tmp_path}")
    assert labels(df)["rafdb_basic/train/6/train_6_aligned.jpg"] == "Angry" and set(df.split) == {"train", "test"}


def test_rafdb_compound_maps_to_the_first_named_emotion(tmp_path):
    for k in range(1, 12): put(tmp_path / f"Image/aligned/train_{k:04d}_aligned.jpg", k)
    put(tmp_path / "EmoLabel/list_patition_label.txt", data="".join(f"train_{k:04d}.jpg {k}\n" for k in range(1, 13)).encode())
    df = read_source(f"rafdb_compound={tmp_path}").sort_values("id")
    assert list(df.label[df.excluded == ""]) == ["Happy", "Happy", "Sad", "Sad", "Sad", "Sad", "Fear", "Fear", "Angry", "Angry", "Disgust"]
    assert set(df.excluded) == {"", "missing file"}


def test_rafml(tmp_path):
    for k in range(4): put(tmp_path / f"Image/aligned/{k:04d}_aligned.jpg", k)
    lines = ["0000.jpg 0.7 0.1 0.1 0.1 0 0", "0001.jpg 0 0 0 0 0.4 0.6", "0002.jpg 0.5 0.5 0 0 0 0", "0003.jpg 0 0 0 1 0 0"]
    put(tmp_path / "EmoLabel/distribution.txt", data="\n".join(lines).encode())
    put(tmp_path / "EmoLabel/partition_label.txt", data=b"0000.jpg 0\n0001.jpg 0\n0002.jpg 0\n0003.jpg 1\n")
    df = read_source(f"rafml={tmp_path}")
    assert said(df) == ["Surprise", "Angry", "tied votes", "Happy"] and list(df.split) == ["train"] * 3 + ["test"]
    assert df.votes[1] == (0.6, 0, 0, 0, 0.4, 0, 0)


def test_affectnet_csv(tmp_path):
    put(tmp_path / "training.csv", data=(
        "subDirectory_filePath,face_x,face_y,face_width,face_height,facial_landmarks,expression,valence,arousal\n"
        + "".join(f"{k}/a{k}.jpg,4,6,30,32,1;2,{k},0.1,0.2\n" for k in range(11))).encode())
    put(tmp_path / "validation.csv", data=b"subDirectory_filePath,expression\n20/b.jpg,1\n21/lost.jpg,2\n")
    for k in range(11): put(tmp_path / f"Manually_Annotated_Images/{k}/a{k}.jpg", k)
    put(tmp_path / "Manually_Annotated_Images/20/b.jpg", 20)
    m = build([f"affectnet={tmp_path}"], tmp_path / "m", val_fraction=0)
    what = {i.split("/")[-1]: w for i, w in zip(m.df.id, said(m.df))}
    assert [what[f"a{k}.jpg"] for k in range(7)] == ["Neutral", "Happy", "Sad", "Surprise", "Fear", "Disgust", "Angry"]
    assert [what[f"a{k}.jpg"] for k in range(7, 11)] == [*(f"unmapped label: {x}" for x in ("contempt", "none", "uncertain")), "not a face"]
    assert what["lost.jpg"] == "missing file" and m.df[m.df.id.str.endswith("b.jpg")].split.item() == "test"
    first = m.df[m.df.id.str.endswith("a0.jpg")].iloc[0]
    assert list(first.box) == [4, 6, 34, 38]
    assert first.pixel_hash == pixel_hash(decode(read_bytes(first.path))[6:38, 4:34])


def test_affectnet_folders(tmp_path):
    for k in range(8): put(tmp_path / f"train/{k}/x{k}.jpg", k)
    put(tmp_path / "val/contempt/y.jpg", 30)
    put(tmp_path / "val/anger/z.jpg", 31)
    df = read_source(f"affectnet={tmp_path}")
    what = {i.split("/")[-1]: (w, s) for i, w, s in zip(df.id, said(df), df.split)}
    assert what["x6.jpg"] == ("Angry", "train") and what["x7.jpg"] == ("unmapped label: contempt", "train")
    assert what["z.jpg"] == ("Angry", "test")


def test_expw_faces_of_one_photograph_are_rows_of_their_own(tmp_path):
    put(tmp_path / "image/origin/two.jpg", 1)
    put(tmp_path / "image/origin/one.jpg", 2)
    lines = ["two.jpg 0 0 0 24 24 80.5 3", "two.jpg 1 20 20 48 48 60.0 0", "one.jpg 0 5 6 40 44 99.1 6", "one.jpg 1 90 90 99 99 5 2"]
    put(tmp_path / "label/label.lst", data="\n".join(lines).encode())
    m = build([f"expw={tmp_path}"], tmp_path / "m", val_fraction=0)
    assert dict(zip(m.df.id, said(m.df))) == {
        "expw/image/origin/one.jpg#0": "Neutral", "expw/image/origin/one.jpg#1": "box outside of the picture",
        "expw/image/origin/two.jpg#0": "Happy", "expw/image/origin/two.jpg#1": "Angry"}
    assert m.df.pixel_hash[2] != m.df.pixel_hash[3] and m.df.sha256[2] == m.df.sha256[3]
    assert m.df.confidence[2] == 80.5 and list(m.df.box[0]) == [6, 5, 40, 44]  # left, top, right, bottom
    assert audit_manifest(tmp_path / "m", progress=False).report.identical_groups == 0
    assert validate_manifest(tmp_path / "m", progress=False).report.passed


def test_folder_aliases_parts_and_stray_files(tmp_path):
    root = tmp_path / "mine"
    for k, name in enumerate(["anger", "Disgusted", "afraid", "JOY", "sadness", "Surprised", "neutral", "bored"]):
        put(root / f"some/where/training/{name}/{k}.PNG", k, ".png")
    put(root / "some/where/valid/happy/v.png", 40)
    put(root / "some/where/test/happy/t.png", 41)
    for junk in ("__MACOSX/training/happy/._1.png", ".DS_Store", "some/where/training/happy/Thumbs.db", "some/where/notes.txt"):
        put(root / junk, data=b"junk")
    m = build([f"folder={root}"], tmp_path / "m")
    assert said(m.df[m.df.usage == "training"]) == [
        "Disgust", "Happy", "Surprise", "Fear", "Angry", "unmapped label: bored", "Neutral", "Sad"]  # by id, capitals first
    assert (m.df.split == "val").sum() == 1  # its own validation part; no tenth is drawn from the training part
    assert len(m.df) == 10


def test_synthetic_layout(tmp_path):
    rows = [("Happy/0.png", "Happy", "Happy", "studio", "train"), ("Sad/1.png", "Fear", "Sad", "wild", "val"),
            ("Fear/2.png", "Fear", "Fear", "wild", "test")]
    write_fer_csv(tmp_path / "labels.csv", rows, ("file", "label", "true_label", "source", "split"))
    for k, (f, *_) in enumerate(rows): put(tmp_path / f, k)
    df = read_source(f"synthetic={tmp_path}")
    assert list(df.id) == ["synthetic_studio/Happy/0.png", "synthetic_wild/Fear/2.png", "synthetic_wild/Sad/1.png"]
    assert list(df.label) == ["Happy", "Fear", "Fear"] and list(df.split) == ["train", "test", "val"]


# --- wrong input ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", sorted(ADAPTERS))
def test_every_kind_refuses_a_wrong_path_an_empty_folder_and_a_foreign_one(tmp_path, kind):
    (tmp_path / "empty").mkdir()
    put(tmp_path / "foreign/readme.txt", data=b"hello")
    for where, says in (("nowhere", "no such file or folder"), ("empty", "is empty"), ("foreign", ".")):
        with pytest.raises(UsageError, match=says) as e: build([f"{kind}={tmp_path / where}"], tmp_path / "m")
        assert where in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("spec, says", [
    ("fer=x", "unknown source kind 'fer'.*affectnet, expw, fer2013_csv, fer2013_folder"), ("folder", "has no path"),
    ("folder:a b=x", "source name"),
])
def test_wrong_source_specs(tmp_path, spec, says):
    with pytest.raises(UsageError, match=says): build([spec], tmp_path / "m")


@pytest.mark.parametrize("kwargs", [{"val_fraction": 1.0}, {"val_fraction": -0.1}, {"name": "a b"}, {"name": ""}, {"max_hamming": 64}])
def test_wrong_arguments(kaggle, tmp_path, kwargs):
    with pytest.raises(UsageError): build([f"fer2013_folder={kaggle}"], tmp_path / "m", **kwargs)
    with pytest.raises(UsageError, match="no sources"): build([], tmp_path / "m")


def test_two_sources_need_two_names(kaggle, tmp_path):
    with pytest.raises(UsageError, match="two sources are called 'fer2013'"): build([f"fer2013_folder={kaggle}"] * 2, tmp_path / "m")
    m = build([f"fer2013_folder={kaggle}", f"fer2013_folder:again={kaggle}"], tmp_path / "m")
    assert m.index.source_counts == {"again": 49, "fer2013": 49}


@pytest.mark.parametrize("name", ["../x.png", "a/../../x.png", "/etc/x.png", "C:/x.png", "..\\x.png", "\\x.png"])
def test_zip_with_paths_that_point_outside(tmp_path, name):
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as z:
        z.writestr("train/happy/a.png", encode(picture(1)))
        z.writestr(zipfile.ZipInfo(name), encode(picture(2)))
    with pytest.raises(ArtifactError, match="unsafe member name"): build([f"folder={tmp_path / 'z.zip'}"], tmp_path / "m")
    with pytest.raises(ArtifactError, match="unsafe member name"): read_bytes(f"{tmp_path / 'z.zip'}!train/happy/a.png")


@pytest.mark.parametrize("cut", [1, 30, 2000])
def test_truncated_zip(kaggle, tmp_path, cut):
    z = zipped(kaggle, tmp_path / "k.zip")
    z.write_bytes(z.read_bytes()[:-cut])
    with pytest.raises(FerError, match="k.zip: is cut short or not a zip file"): build([f"fer2013_folder={z}"], tmp_path / "m")


def test_damaged_member_stays_as_an_excluded_row(kaggle, tmp_path):
    z = zipped(kaggle, tmp_path / "k.zip")
    data = bytearray(z.read_bytes())
    at = data.find(b"train/sad/Training_40.jpg") + 60
    data[at] ^= 255
    z.write_bytes(data)
    m = build([f"fer2013_folder={z}"], tmp_path / "m")
    assert m.index.excluded == {"broken file": 1} and m.index.row_count == 49


@given(st.binary(max_size=3000), st.sampled_from([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]))
@QUICK
def test_zip_members_come_back_as_they_went_in(tmp_path, data, method):
    with zipfile.ZipFile(tmp_path / "z.zip", "w", method) as z: z.writestr("d/m", data)
    assert read_bytes(f"{tmp_path / 'z.zip'}!d/m") == data


def test_a_zip_bomb_is_not_unpacked(tmp_path):
    bomb = tmp_path / "bomb.zip"
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as z: z.writestr("train/happy/x.png", b"\0" * (1 << 24))
    data = bytearray(bomb.read_bytes())
    at = data.find(b"PK\1\2")
    data[at + 24:at + 28] = (100).to_bytes(4, "little")  # the directory says 100 bytes
    bomb.write_bytes(data)
    with pytest.raises(ArtifactError, match="damaged"): read_bytes(f"{bomb}!train/happy/x.png")


def test_decode_refuses_text_nothing_and_halves():
    for data in (b"", b"text", encode(picture(1), ".jpg")[:-30], encode(picture(1))[:-30]):
        with pytest.raises(FerError, match="face.png: not a whole image"): decode(data, name="face.png")


# --- tampering --------------------------------------------------------------------------------------------------------

def test_image_replaced_by_text_before_and_after_the_build(kaggle, tmp_path):
    (kaggle / "train/happy/Training_30.jpg").write_text("text")
    m = build([f"fer2013_folder={kaggle}"], tmp_path / "m")
    row = m.df[m.df.excluded != ""].iloc[0]
    assert (row.id, row.excluded, row.label) == ("fer2013/train/happy/Training_30.jpg", "broken file", "Happy")
    assert validate_manifest(tmp_path / "m", progress=False).report.passed  # excluded rows don't shut the gate
    (kaggle / "train/happy/Training_31.jpg").write_text("text")
    with pytest.raises(GateError, match="Training_31.jpg does not decode"): validate_manifest(tmp_path / "m", progress=False)
    assert not ManifestValidation.load(tmp_path / "m").passed
    with pytest.raises(GateError, match="cannot be read"): audit_manifest(tmp_path / "m", progress=False)


def test_a_changed_zip_is_noticed_in_the_same_process(kaggle, tmp_path):
    z = zipped(kaggle, tmp_path / "k.zip")
    build([f"fer2013_folder={z}"], tmp_path / "m")
    put(kaggle / "train/sad/Training_40.jpg", 999)
    (kaggle / "train/sad/Training_41.jpg").unlink()
    zipped(kaggle, z)
    with pytest.raises(GateError, match="Training_41.jpg is missing; .*Training_40.jpg was changed"):
        validate_manifest(tmp_path / "m", progress=False)


def test_same_bytes_length_other_pixels_is_changed(kaggle, tmp_path):
    build([f"fer2013_folder={kaggle}"], tmp_path / "m")
    f = kaggle / "train/sad/Training_40.jpg"
    data = bytearray(f.read_bytes())
    data[20] ^= 1  # a header byte: the pixels may well be the same
    f.write_bytes(data)
    with pytest.raises(GateError): validate_manifest(tmp_path / "m", progress=False)


def test_bad_label_fails_validation(kaggle, tmp_path):
    m = build([f"fer2013_folder={kaggle}"], tmp_path / "m")
    table = pq.read_table(tmp_path / "m/manifest.parquet")
    col = table["label"].to_pylist()
    col[5] = "Bored"
    pq.write_table(table.set_column(table.column_names.index("label"), "label", [col]), tmp_path / "m/manifest.parquet")
    with pytest.raises(GateError, match="changed after its folder was sealed"): load_manifest(tmp_path / "m")
    seal_folder(tmp_path / "m", m.dataset_index_id, ["manifest.parquet", "manifest.csv", "dataset_index.json", "class_order.json"])
    with pytest.raises(GateError, match="none of the seven"): validate_manifest(tmp_path / "m", progress=False)


@pytest.mark.parametrize("file", ["manifest.parquet", "manifest.csv", "dataset_index.json", "class_order.json", "hash_manifest.json"])
def test_missing_and_cut_files_are_refused(kaggle, tmp_path, file):
    build([f"fer2013_folder={kaggle}"], tmp_path / "m")
    path = tmp_path / "m" / file
    data = path.read_bytes()
    path.write_bytes(data[:len(data) // 2])
    with pytest.raises(GateError, match=file.split(".")[0]): load_manifest(tmp_path / "m")
    path.unlink()
    with pytest.raises(GateError, match=file.split(".")[0]): load_manifest(tmp_path / "m")


def test_swapped_class_order_is_refused(kaggle, tmp_path):
    m = build([f"fer2013_folder={kaggle}"], tmp_path / "m")
    f = tmp_path / "m/class_order.json"
    f.write_text(f.read_text().replace("Angry", "X").replace("Disgust", "Angry").replace("X", "Disgust"))
    seal_folder(tmp_path / "m", m.dataset_index_id, ["manifest.parquet", "manifest.csv", "dataset_index.json", "class_order.json"])
    with pytest.raises(GateError, match="class order"): load_manifest(tmp_path / "m")


def test_rebuilding_drops_the_old_reports(kaggle, tmp_path):
    build([f"fer2013_folder={kaggle}"], tmp_path / "m")
    audit_manifest(tmp_path / "m", progress=False)
    build([f"fer2013_folder={kaggle}"], tmp_path / "m", seed=5, validate=False)
    assert not (tmp_path / "m/leakage_report.json").exists() and not (tmp_path / "m/manifest_validation.json").exists()
    with pytest.raises(GateError, match="manifest_validation.json"): load_manifest(tmp_path / "m", valid=True)


def test_validation_of_another_manifest_is_refused(kaggle, tmp_path):
    build([f"fer2013_folder={kaggle}"], tmp_path / "a")
    build([f"fer2013_folder={kaggle}"], tmp_path / "b", seed=6)
    shutil.copy(tmp_path / "a/manifest_validation.json", tmp_path / "b")
    with pytest.raises(GateError, match="belongs to another manifest"): load_manifest(tmp_path / "b", valid=True)


def test_sample_validation_says_so(kaggle, tmp_path):
    build([f"fer2013_folder={kaggle}"], tmp_path / "m")
    report = validate_manifest(tmp_path / "m", sample=10, progress=False).report
    assert (report.checked_rows, report.sample, report.passed) == (10, 10, True)
    with pytest.raises(UsageError, match="sample 0"): validate_manifest(tmp_path / "m", sample=0)


# --- properties -------------------------------------------------------------------------------------------------------

def tables(max_rows=120):
    row = st.tuples(st.integers(0, 40), st.integers(0, 2), st.sampled_from(["a", "b", "c"]), st.sampled_from(CLASSES),
                    st.sampled_from(["train"] * 4 + ["test", "val"]), st.sampled_from(["", "", "", "not a face"]))
    return st.lists(row, min_size=1, max_size=max_rows).map(lambda rows: pd.DataFrame({
        "id": [f"s/{k}" for k in range(len(rows))], "group": [f"g{g}" for g, *_ in rows], "pixel_hash": [f"p{g}.{v}" for g, v, *_ in rows],
        "source": [r[2] for r in rows], "label": [r[3] for r in rows], "split": [r[4] for r in rows], "excluded": [r[5] for r in rows],
        "sha256": [f"{k:x}" for k in range(len(rows))]}))


@given(tables(), st.integers(0, 5), st.sampled_from([0.0, 0.1, 0.3]))
@QUICK
def test_splits_leak_nothing_and_do_not_depend_on_order(df, seed, fraction):
    done = assign_splits(df, fraction, seed)
    usable = done[done.excluded == ""]
    splits = usable.groupby("group").split.agg(set)
    assert all(len(s) == 1 or s == {"val", "test"} - {"val"} for s in splits if "test" in s)  # no usable train or val row beside a test row
    assert all(s in ({"train"}, {"val"}, {"test"}) for s in splits)
    assert len(done) == len(df) and (done.label == df.label).all()
    assert ((df.split == "test") == (done.split == "test")).all()  # test stays test
    assert (done.excluded[df.excluded != ""] == df.excluded[df.excluded != ""]).all()  # the first reason stays
    again = assign_splits(df.sample(frac=1, random_state=1), fraction, seed).sort_index()
    assert again.equals(done)
    assert dataset_fingerprint(again.sample(frac=1, random_state=2)) == dataset_fingerprint(done)


@given(tables(), st.integers(0, 1000), st.sampled_from(["label", "split", "sha256", "excluded"]))
@QUICK
def test_the_fingerprint_sees_every_change(df, at, column):
    k = at % len(df)
    other = df.copy()
    other.loc[k, column] = df.loc[k, column] + "x"
    if not (column == "split" and df.excluded[k]):  # an excluded row has no split
        assert dataset_fingerprint(other) != dataset_fingerprint(df)


def test_the_draw_is_stratified_and_near_its_fraction():
    rng = np.random.default_rng(0)
    n = 6000
    df = pd.DataFrame({"group": [f"g{k}" for k in rng.integers(0, 3000, n)], "source": rng.choice(["a", "b"], n),
                       "split": "train", "excluded": "", "label": rng.choice(CLASSES, n, p=[.25, .015, .15, .3, .15, .085, .05])})
    df["label"] = df.groupby("group").label.transform("first")
    done = assign_splits(df.assign(pixel_hash=df.group), 0.1, 3)
    share = (done.split == "val").groupby(done.label).mean()
    assert share.between(0.085, 0.115).drop("Disgust").all() and 0.05 < share["Disgust"] < 0.15
    assert 0.095 < (done.split == "val").mean() < 0.105


@given(st.lists(st.integers(0, 2**64 - 1), max_size=60, unique=True), st.integers(0, 12), st.randoms(use_true_random=False))
@QUICK
def test_hamming_pairs_against_all_pairs(values, max_hamming, random):
    near = [v ^ sum(1 << b for b in random.sample(range(64), random.randint(1, 12))) for v in values[:20]]
    h = np.unique(np.array([*values, *near], dtype=np.uint64))
    plain = np.argwhere(np.triu(np.bitwise_count(h[:, None] ^ h) <= max_hamming, 1)) if len(h) else np.zeros((0, 2))
    assert np.array_equal(hamming_pairs(h, max_hamming), plain)


def test_coefficients_are_exact_integers_in_any_batch():
    faces = np.stack([picture(k) for k in range(40)])
    whole = coefficients(faces) * 48 * 48
    assert np.array_equal(np.round(whole), np.round(whole, 3))
    assert np.array_equal(perceptual_hashes(coefficients(faces)), np.concatenate([perceptual_hashes(coefficients(f[None])) for f in faces]))
    dct = cv2.dct(faces[0].astype(np.float64))  # another implementation, up to the scale of the first row and column
    ours = coefficients(faces[:1])[0]
    assert np.isclose(ours[0] / dct[0, 1] / (ours[1] / dct[1, 0]), 1, atol=1e-3)


def test_hash_stays_near_under_encoding_size_and_light():
    rng = np.random.default_rng(3)
    worst = 0
    for k in range(60):
        face = np.clip(picture(k).astype(int) + rng.normal(0, 6, (48, 48)), 0, 255).astype(np.uint8)
        versions = [face, decode(encode(face, ".jpg")), cv2.resize(face, (96, 96), interpolation=cv2.INTER_CUBIC),
                    cv2.convertScaleAbs(face, alpha=0.8, beta=15)]
        h = [int(perceptual_hashes(coefficients(v[None]))[0]) for v in versions]
        worst = max(worst, *[(h[0] ^ x).bit_count() for x in h[1:]])
    assert worst <= 6


def test_groups_are_transitive_and_flat_pictures_stand_alone(tmp_path):
    faces = {"a.png": picture(1), "a.jpg": picture(1), "b.png": picture(2), "black.png": np.zeros((48, 48), np.uint8),
             "grey.png": np.full((48, 48), 9, np.uint8)}
    for name, face in faces.items(): put(tmp_path / name, data=encode(face, Path(name).suffix))
    group = find_groups(fingerprint([str(tmp_path / n) for n in faces], progress=False)).group
    assert group[0] == group[1] and len(set(group)) == 4


def test_workers_and_order_do_not_matter(tmp_path):
    for k in range(1200): put(tmp_path / f"{k}.png", k % 700)
    paths = [str(tmp_path / f"{k}.png") for k in range(1200)]
    one, two = fingerprint(paths, workers=1, progress=False), fingerprint(paths, workers=2, progress=False)
    back = fingerprint(paths[::-1], workers=2, progress=False, chunk=100)
    for a, b, c in zip(one, two, back): assert np.array_equal(a, b) and np.array_equal(a, c[::-1])


def test_16_bit_alpha_and_colour(tmp_path):
    rng = np.random.default_rng(0)
    kinds = {"c.png": rng.integers(0, 256, (20, 30, 3), dtype=np.uint8), "a.png": rng.integers(0, 256, (20, 30, 4), dtype=np.uint8),
             "d.png": rng.integers(0, 65536, (20, 30), dtype=np.uint16), "big.png": cv2.resize(picture(3), (900, 700))}
    for name, image in kinds.items(): put(tmp_path / name, data=encode(image))
    p = fingerprint([str(tmp_path / n) for n in kinds], progress=False)
    assert not p.problem.any() and list(p.width) == [30, 30, 30, 900] and len(set(p.pixel_hash)) == 4


def test_views_partition_and_filters(kaggle, tmp_path):
    put(kaggle / "train/fear/Training_copy.jpg", 0)  # an Angry picture again, as Fear
    m = build([f"fer2013_folder={kaggle}"], tmp_path / "m")
    assert len(m.view("train_all")) + len(m.view("val")) + len(m.view("test")) == len(m.view("all")) == 50
    hq, train = m.view("hq_train"), m.view("train_all")
    pair = m.df[m.df.pixel_hash.duplicated(keep=False)]
    assert len(pair) == 2 and pair.split.nunique() == 1
    assert not set(hq.id) & set(pair.id) and set(hq.id) <= set(train.id)
    for v in VIEWS: assert list(m.view(v).index) == list(range(len(m.view(v))))
    assert len(load_manifest(tmp_path / "m", valid=True).df) == 50
    twin = pd.read_csv(tmp_path / "m/manifest.csv")
    assert list(twin.id) == list(m.df.id) and list(twin.columns) == list(m.df.columns)


# --- the real zips ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real(real_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("real")
    build([f"fer2013_folder={real_data / 'fer2013.zip'}", f"ferplus={real_data / 'ferplus.zip'}"], out, name="real")
    return load_manifest(out, valid=True)


@pytest.fixture(scope="module")
def real_audit(real): return audit_manifest(real.folder, progress=False).report


def test_real_counts(real):
    assert real.index.source_counts == {"fer2013": 32298, "ferplus": 32137}
    assert real.df.groupby(["source", "usage"]).size().to_dict() == {
        ("fer2013", "PublicTest"): 3589, ("fer2013", "Training"): 28709,
        ("ferplus", "FER2013Train"): 28558, ("ferplus", "FER2013Valid"): 3579}
    report = validate_manifest(real.folder, progress=False).report
    assert (report.missing, report.undecodable, report.bad_labels, report.changed) == (0, 0, 0, 0)
    assert report.checked_rows == real.index.usable_count == 64435 - sum(real.index.excluded.values())
    assert real.index.excluded.keys() == {"tied votes", "not a face", "unmapped label: contempt", "unmapped label: unknown",
                                          "duplicate of a test image", "near-duplicate of a test image"}


def test_real_duplicates(real_audit):
    assert real_audit.identical_groups_by_source["fer2013"] == 1273
    parts = {(o.a, o.b): o for o in real_audit.identical_across_parts}
    assert parts["ferplus/FER2013Train", "ferplus/FER2013Valid"].rows_b == 279
    assert real_audit.remaining_leaks == 0
    assert LeakageReport.model_validate(real_audit.model_dump(by_alias=True)) == real_audit


def test_real_groups_stay_in_one_split(real):
    usable = real.df[real.df.excluded == ""]
    assert usable.groupby("group").split.nunique().max() == 1
    val = (usable.split == "val").sum() / (usable.split != "test").sum()
    assert 0.095 < val < 0.105


def test_real_matching_agrees_with_the_crosswalk(real, real_data):
    "FER2013's own label of every FERPlus picture, from an independent table, is among the labels of the JPEGs in its group."
    path = real_data / "fer2013_ferplus_crosswalk.csv"
    if not path.is_file(): pytest.skip("the crosswalk is not at hand")
    table = pd.read_csv(path).set_index("ferplus_image").fer2013_label.str.split("|").map(set)
    jpeg = real.df[real.df.source == "fer2013"].groupby("group").label.agg(lambda x: {c.lower() for c in x})
    png = real.df[real.df.source == "ferplus"]
    ours, theirs = png.group.map(jpeg), png.id.str.rsplit("/").str[-1].map(table)
    assert ours.notna().all() and theirs.notna().all() and len(png) == 32137  # every PNG has found its JPEG
    assert all(t <= o for t, o in zip(theirs, ours))
    assert sum(t == o for t, o in zip(theirs, ours)) > 31700  # the others share a group with another crop of the photograph
