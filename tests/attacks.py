"""Forgeries of a finished run, and the words that must name each. Where the folder is sealed again, only a contradiction tells."""
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

from fer_nb.artifacts import read_npz, write_npz
from fer_nb.leaves import seal_folder
from fer_nb.records import HashManifest, ThroughDetector

ATTACKS: dict = {}  # name -> (what is done to the folder, words of the line that must be NO-GO)


def attack(says: str):
    "An attack under its function's name."
    def keep(do):
        ATTACKS[do.__name__] = do, says
        return do
    return keep


def student(run: Path, stage: str = "KD") -> Path: return min(run.glob(f"students/*_{stage}"))
def teacher(run: Path) -> Path: return min(run.glob("teachers/*stageA*"))
def ensemble(run: Path) -> Path: return min(p for p in run.glob("ensembles/*") if p.is_dir())


def reseal(folder: Path, files=None): seal_folder(folder, HashManifest.load(folder).dataset_index_id, files)


def edit(path: Path, **values):
    "Change values of a JSON file; a dotted name goes deeper."
    content = json.loads(path.read_text())
    for name, value in values.items():
        *where, last = name.split("__")
        at = content
        for key in where: at = at[key]
        at[last] = value
    path.write_text(json.dumps(content))


def flip(path: Path):
    "Turn one bit in the middle of a file."
    content = bytearray(path.read_bytes())
    content[len(content)//2] ^= 1
    path.write_bytes(content)


@attack("args.json: is missing|args.json.*\n.*is missing, and a run's files")
def without_args(run): (student(run)/"args.json").unlink()


@attack("manifests/ is missing|no manifest stands here")
def without_manifests(run): shutil.rmtree(run/"manifests")


@attack("students/.* is missing")
def without_students(run): shutil.rmtree(run/"students")


@attack("ensembles/.* is missing")
def without_ensembles(run): shutil.rmtree(run/"ensembles")


@attack("teachers/.* is missing")
def without_one_teacher(run): shutil.rmtree(teacher(run))


@attack("model_fp32.onnx .* is missing")
def without_exports(run):
    for path in run.rglob("*.onnx"): path.unlink()


@attack("onnx/ is missing")
def without_the_export_folder(run): shutil.rmtree(run/"onnx")


@attack("the seal does not list .*, which such a folder owes")
def an_empty_seal(run): edit(student(run)/"hash_manifest.json", files={})


@attack("the seal does not list .*, which such a folder owes")
def a_short_seal(run):
    folder = student(run)
    reseal(folder, ["args.json", "seed.txt"])


@attack("fitted to other weights")
def weights_of_another_run(run):
    shutil.copy(student(run, "CE")/"best.pt", student(run)/"best.pt")
    reseal(student(run))


@attack("best.pt is of stage")
def weights_of_another_run_with_its_hash(run):
    shutil.copy(student(run, "CE")/"best.pt", student(run)/"best.pt")
    reseal(student(run))
    edit(student(run)/"calibration.json", checkpoint_sha256=HashManifest.load(student(run)).files["best.pt"])
    reseal(student(run))


@attack("accuracy is 0.9900 in the report, and")
def a_better_accuracy(run):
    edit(student(run)/"reliability_metrics.json", accuracy={"value": 0.99, "low": 0.98, "high": 1.0})
    reseal(student(run))


@attack("ece is .* in the report, and")
def a_better_calibration(run):
    edit(teacher(run)/"reliability_metrics.json", ece={"value": 0.5, "low": 0.4, "high": 0.6})
    reseal(teacher(run))


@attack("the confusion in the report|test rows, evaluation.npz has|in the report, and")
def answers_of_another_run(run):
    shutil.copy(teacher(run)/"evaluation.npz", student(run)/"evaluation.npz")
    reseal(student(run))


@attack("another temperature than calibration.json")
def another_temperature(run):
    edit(student(run)/"calibration.json", selected_temperature=1.23)
    reseal(student(run))


@attack("another one than it learned from")
def softlabels_changed_after_they_taught(run):
    folder = ensemble(run)/"softlabels"
    z = read_npz(folder/"softlabels.npz")
    write_npz(folder/"softlabels.npz", **z | {"logits": z["logits"] + 1})
    reseal(folder, [f for f in HashManifest.load(folder).files])
    reseal(ensemble(run))


@attack("another one than it learned from|fitted to other weights")
def a_start_that_was_trained_again(run):
    flip(student(run, "CE")/"best.pt")
    reseal(student(run, "CE"))


@attack("of other-000000000000")
def an_alignment_report_of_another_dataset(run):
    edit(student(run)/"alignment_report.json", dataset_index_id="other-000000000000")
    reseal(student(run))


@attack("of other-000000000000")
def a_teachers_alignment_of_another_dataset(run):
    edit(teacher(run)/"softlabels"/"alignment_report.json", dataset_index_id="other-000000000000")
    reseal(teacher(run))


@attack("1 of .* usable rows were read")
def a_manifest_validated_on_one_row(run): edit(run/"manifests"/"manifest_validation.json", checked_rows=1, sample=1)


@attack("the rows' fingerprint is")
def a_label_changed_in_the_table(run):
    table = pd.read_parquet(run/"manifests"/"manifest.parquet")
    table.loc[0, "label"] = "Happy" if table.loc[0, "label"] != "Happy" else "Sad"
    table.to_parquet(run/"manifests"/"manifest.parquet")
    reseal(run/"manifests", list(HashManifest.load(run/"manifests").files))


@attack("is a link to")
def a_run_that_is_a_link(run):
    elsewhere = run.parent/"elsewhere"
    shutil.move(student(run), elsewhere)
    student_name = f"{elsewhere.name}_KD"
    (run/"students"/student_name).symlink_to(elsewhere, target_is_directory=True)


@attack("seed.txt says 7")
def another_seed(run):
    (student(run)/"seed.txt").write_text("7\n")
    reseal(student(run))


@attack("softlabels_index.jsonl names other rows")
def an_index_of_other_rows(run):
    folder = teacher(run)/"softlabels"
    index = folder/"softlabels_index.jsonl"
    index.write_text(index.read_text().replace('"split": "train"', '"split": "val"', 1))
    reseal(folder, list(HashManifest.load(folder).files))
    reseal(teacher(run))


@attack("sample_count.txt says 7")
def a_count_of_other_rows(run):
    folder = teacher(run)/"softlabels"
    (folder/"sample_count.txt").write_text("7\n")
    reseal(folder, list(HashManifest.load(folder).files))
    reseal(teacher(run))


@attack("note.json stands here and not in the seal")
def a_file_beside_the_sealed_ones(run): (student(run)/"note.json").write_text("{}")


@attack("images.npy was changed since it was packed")
def a_pixel_in_the_cache(run): flip(min(run.glob("cache/img*"))/"images.npy")


@attack("is not the file that was compared")
def a_bit_in_an_export(run): flip(min((run/"onnx").glob("*.onnx")))


@attack("no run here has the weights")
def an_export_of_another_run(run):
    for name in ("onnx_export_report.json", "onnx_parity.json"): edit(run/"onnx"/name, checkpoint_hash="0"*64)


@attack("was compared with nothing")
def a_file_that_nobody_compared(run):
    report = json.loads((run/"onnx"/"onnx_export_report.json").read_text())
    edit(run/"onnx"/"onnx_parity.json", variants={})
    assert report["files"]


@attack("epochs are trained|history.json names")
def more_epochs_than_were_trained(run):
    edit(student(run)/"history.json", epochs_done=99, epochs_total=99)
    reseal(student(run))


@attack("is nested deeper than any artifact")
def a_nested_json(run): (student(run)/"history.json").write_text("["*200_000)


@attack("not in the order of its frames|holds no frames")
def frames_out_of_order(run):
    path = run/"demo"/"first"/"per_frame.csv"
    head, *rows = path.read_text().splitlines()
    path.write_text("\n".join([head, *reversed(rows)]) + "\n")


@attack("missing: latency.csv")
def a_session_without_its_times(run): (run/"demo"/"first"/"latency.csv").unlink()


@attack("evaluation.npz")
def an_archive_that_is_none(run): (student(run)/"evaluation.npz").write_bytes(np.random.default_rng(0).bytes(1000))


@attack("was changed after its folder was sealed")
def a_latency_of_ones_own(run):
    path = run/"onnx"/"latency_benchmarks.csv"
    path.write_text(path.read_text().replace("fp32", "FP32"))


@attack("is of the weights 000000000000")
def another_model_behind_the_detector(run):
    report = json.loads((run/"onnx"/"onnx_export_report.json").read_text())
    seen = ThroughDetector(model_name="another", checkpoint_sha256="0"*64, dataset_index_id=report["dataset_index_id"], rows=[],
                           resamples=2, seed=0)
    seen.save(run/"onnx")


@attack("shown.accuracy is 0.99, and its confusion matrix says")
def a_session_that_scored_better(run): edit(run/"demo"/"first"/"score_results.json", shown__accuracy__value=0.99)
