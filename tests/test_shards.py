"""Validation in shards on the command line: any cut merges to the same bytes, and parts that don't belong together are refused."""
import cv2
import numpy as np
import pytest

from fer_nb.cli import main
from fer_nb.shards import Shard, shard_of
from fer_nb.synthetic import write_dataset


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
