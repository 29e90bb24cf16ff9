"""Wrong command lines: each ends with the exit code that --help promises and one line, and before a kernel has begun."""
import cv2
import numpy as np
import pytest

from fer_nb import cli

WRONG = """
2 |
2 fly
2 predct face.png
2 --nonsense
2 manifest
2 manifest fly
2 manifest build
2 manifest build --out {out}
2 manifest build --source {file} --out {out}
2 manifest build --source synthetic={none} --out {out}
2 manifest build --source synthetic={empty} --out {out}
2 manifest build --source nothing={empty} --out {out}
2 manifest build --source synthetic={empty} --out {out} --seed -1
2 manifest build --source synthetic={empty} --out {out} --seed x
2 manifest build --source synthetic={empty} --out {out} --val-fraction 2
2 manifest build --source synthetic={empty} --out {out} --val-fraction nan
2 manifest build --source folder={empty} --out {file}
2 manifest validate
2 manifest validate {none}
2 manifest validate {file}
1 manifest validate {empty}
2 manifest validate {empty} --sample -1
2 manifest audit {none}
1 manifest audit {empty}
2 manifest audit {empty} --max-hamming 65
2 manifest audit {empty} --max-hamming 1.5
2 teacher
2 teacher train --arch NOPE
2 teacher train --arch
2 teacher train --epochs 0
2 teacher train --epochs -3
2 teacher train --epochs 1.5
2 teacher train --epochs many
2 teacher train --seed -1
2 teacher train --seed 4294967296
2 teacher train --manifest {empty}
2 teacher train --cache {empty}
2 teacher train --weights {none}
2 teacher train --weights {file} --arch NOPE
2 teacher train --init-from {none}
2 teacher train -p epoch 3
2 teacher train -p epochs
2 teacher train -p epochs 0
2 teacher train -p epochs x
2 teacher train -p batch_size 0
2 teacher train -p lr x
2 teacher train -p margin x
2 teacher train -p optimizer rmsprop
2 teacher train -p amp fp8
2 teacher train -p augment 7
2 teacher train -p augment {{"erased":0.5}}
2 teacher train -p batch_size 1
2 teacher train -p warmup_epochs -1
2 teacher train -p scale 0
2 teacher train -p scale -1
2 teacher train -p margin -1
2 teacher train -p margin 5
2 teacher train -p margin_ramp -1
2 teacher train -p stage C
2 teacher train --parameters [1]
2 teacher train --parameters {{
2 teacher train --parameters {deep}
2 teacher train -p augment {deep}
2 teacher train -p lr {huge}
2 teacher train -p epochs 1000000000000
2 notebook 03_teachers {empty}
2 notebook {odd}.ipynb {out}.ipynb
2 teacher train --out {file}
2 teacher export
2 teacher export {none}
1 teacher export {empty}
2 student
2 student train --stage XX
2 student train --stage KD
2 student train --stage KD --softlabels {none}
2 student train --softlabels {empty}
2 student train --init-from {none}
2 student train --epochs 0
2 student train --seed -1
2 student train --seed 1.5
2 student train -p seed -1
2 student train -p img_size -3
2 student train -p n_images 0
2 student train -p mixup x
2 student train -p negl 3
2 student train -p stage KD
2 student train --supervision both
2 student train -p warmup_epochs -1
2 student train -p label_smoothing -0.1
2 student train -p label_smoothing 1.0
2 student train -p rows -5
2 student train -p batch_size 1
2 student train --out {file}
2 student evaluate {empty}
1 student evaluate {none} --manifest {empty} --cache {empty}
1 student evaluate {empty} --manifest {empty} --cache {empty}
2 student summarise
2 student summarise {none}
2 student summarise {empty}
2 student summarise {empty} --resamples 0
2 ensemble search {empty} --manifest {empty}
2 ensemble search {empty} {none} --manifest {empty} --out {out}
2 ensemble search {empty} {empty} --manifest {none} --out {out}
2 ensemble search {empty} {empty} --manifest {empty} --out {out} --ties -1
2 ensemble search {empty} {empty} --manifest {empty} --out {out} --preset six_way
2 ensemble export {none} --manifest {empty}
1 ensemble export {empty} --manifest {empty}
1 ensemble evaluate {empty} --manifest {empty}
2 recount {none} --manifest {empty}
2 run
2 run --profile
2 run --profile embeded
2 run --profile {none}
2 run --profile {binary}.yaml
2 run --profile embedded --cores 0
2 run --profile embedded --cores -2
2 run --profile embedded --cores x
2 run --profile embedded --out {file}
2 run --profile embedded --out {full}
2 run --profile fer2013
2 run --profile fer2013 --data {none}
2 run --profile fer2013 --data {file}
2 run --profile fer2013 --data {empty}
2 run --profile embedded --convention nobody
2 export
1 export {none}
1 export {empty}
1 export {file}
2 export {empty} --precision fp8
2 bench
1 bench {none}
1 bench {file}
1 bench {fake}.onnx
1 bench {empty}
2 bench {fake}.onnx --runs 0
2 bench {fake}.onnx --runs -5
2 bench {fake}.onnx --batches 0
2 bench {fake}.onnx --threads 0
2 bench {fake}.onnx --providers NopeExecutionProvider
2 bench {fake}.onnx --against {none}
2 predict
2 predict {none}
2 predict {face} --model {none}
1 predict {face} --model {fake}.onnx
2 predict {face} --model nobody
2 predict {face} --detector nobody
2 predict {face} --min-face 0
2 predict {face} --min-face x
2 demo --source {none} --headless
2 demo --source {fake}.mp4 --headless
2 demo --source synthetic:inf --headless
2 demo --source synthetic:-1 --headless
2 demo --source synthetic:nan --headless
2 demo --source synthetic:x --headless
2 demo --source 99999999999999999999 --headless
2 demo --seconds -1 --headless
2 demo --seconds nan --headless
2 demo --ema 1.5 --headless
2 demo --delta -1 --headless
2 demo --window 0 --headless
2 demo --min-count 99 --window 3 --source synthetic:1 --headless
2 demo --model {none} --source synthetic:1 --headless
2 demo --save-clips --source synthetic:1 --headless
2 demo --source synthetic:1 --headless --out {file}
2 score
2 score {none}
2 score {empty}
2 score {empty} --truth {none}
2 replay {empty}
2 replay {none} --ema x
2 tune {empty}
2 tune {empty} --jitter-limit -1
2 tune {empty} --plot {out}.xyz
2 adapt
2 adapt mine {none}
2 adapt mine {empty} --most -1
2 adapt finetune --data {none} --out {out}
2 adapt finetune --data {empty} --out {out} --epochs 0
2 adapt finetune --data {empty} --out {out} --mode tail
2 adapt finetune --data {empty} --out {file}
2 adapt webcams --out {out}
2 adapt webcams --manifest {none} --cache {none} --out {out}
2 adapt webcams --manifest {empty} --cache {empty} --out {out} --every 0
2 adapt webcams --manifest {empty} --cache {empty} --out {out} --left-out rain
2 adapt webcams --manifest {empty} --cache {empty} --out {out} --epochs 40
2 adapt webcams --manifest {empty} --cache {empty} --out {file}
2 adapt gate --out {out}
2 nl smoke
2 nl smoke --manifest {none} --cache {none} --out {out}
2 nl smoke --manifest {empty} --cache {empty} --out {out} --rows 0
2 nl smoke --manifest {empty} --cache {empty} --out {out} --lr nan
1 nl gate --baseline {empty} --part NL {empty}
2 nl gate --baseline {empty}
2 nl gate --baseline {empty} --part NL {empty} --margin 7
2 gates
2 gates {none}
2 gates {file}
1 gates {empty}
2 notebook
2 notebook 99_nothing {out}.ipynb
2 notebook {fake}.ipynb {out}.ipynb
2 notebook 03_teachers {out}.ipynb -p epoch 3
2 notebook 03_teachers {out}.ipynb --parameters nonsense
2 notebook 03_teachers {full}/x/y.ipynb --parameters [
2 report
2 report {none} {out}.html
2 report {fake}.ipynb {out}.html
2 report {file} {out}.html
2 keep {none} {out}
2 keep {empty}
2 framing {none}
2 framing {empty}
""".strip().splitlines()


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root = tmp_path_factory.mktemp("wrong")
    for name in ("empty", "full"): (root/name).mkdir()
    (root/"full"/"note.txt").write_text("not a run")
    (root/"file").write_text("text")
    (root/"binary.yaml").write_bytes(b"about: \xff\xfe")
    for suffix in ("onnx", "png", "mp4", "ipynb"): (root/f"fake.{suffix}").write_bytes(np.random.default_rng(0).bytes(2000))
    cv2.imwrite(str(root/"face.png"), np.full((64, 64, 3), 127, np.uint8))
    (root/"odd.ipynb").write_text('{"cells": [{"cell_type": "code"}]}')
    names = {k: str(root/k) for k in ("empty", "full", "file", "none", "out", "binary", "fake", "odd")}
    return names | {"deep": "["*5000, "huge": "1" + "0"*400, "face": str(root/"face.png"), "root": root}


@pytest.mark.parametrize("line", WRONG)
def test_a_wrong_line_ends_in_one_line_and_its_code(places, monkeypatch, capsys, line):
    code, _, rest = line.partition(" ")
    args = [a.format(**places) for a in rest.split() if a != "|"]
    monkeypatch.chdir(places["root"])
    def no_kernel(*args, **kwargs): raise AssertionError("a kernel was started")
    monkeypatch.setattr("papermill.execute_notebook", no_kernel)
    before = sorted(p.relative_to(places["root"]).as_posix() for p in places["root"].rglob("*"))
    try: got = cli.main(args)
    except SystemExit as e: got = e.code
    said = capsys.readouterr()
    assert "Traceback" not in said.err and "a fault of fer-nb itself" not in said.err, said.err
    assert got == int(code), (got, said.err)
    assert len(said.err.strip().splitlines()) == 1, said.err
    after = sorted(p.relative_to(places["root"]).as_posix() for p in places["root"].rglob("*"))
    assert [p for p in after if p not in before] == []
