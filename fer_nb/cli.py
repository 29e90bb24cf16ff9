"""The command `fer-nb`: a thin cover over the notebooks' functions. Imports wait until a command needs them."""
import argparse
import importlib.util
import json
import os
import re
import sys
import time
import warnings
from contextlib import contextmanager, nullcontext
from importlib import metadata
from pathlib import Path

from fer_nb.artifacts import STAGES, FerError, GateError, UsageError
from fer_nb.flags import Parser, about_function, flags, given, ranged, told  # noqa: F401 (told is for tests)
from fer_nb.locks import RUN_PID, end_with_run, hold, refuse_held

NEEDS = {"notebooks": ("pandas", "scipy", "matplotlib", "anywidget", "ipywidgets", "voila"),
         "train": ("torch", "timm", "fastai", "pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "onnx", "onnxscript",
                   "onnxconverter_common", "threadpoolctl", "papermill", "nbformat", "ipykernel", "IPython", "snakemake", "yaml",
                   "pypandoc", "PIL"),
         "tensorboard": ("tensorboard",)}  # what each extra of settings.ini brings, by the names that are imported
CORE = {"bench", "predict", "demo", "score", "gates"}  # commands that need no extra
TABLES = {"replay", "tune"}  # commands that need pandas, and nothing else that is large

EPILOG = """examples:
  fer-nb run --profile embedded                                    the whole chain on faces that it draws itself
  fer-nb run --profile fer2013 --data fer2013.zip --data ferplus.zip
  fer-nb manifest build --source fer2013_folder=fer2013.zip --source ferplus=ferplus.zip --out runs/mine/manifests
  fer-nb teacher train --arch B3 --manifest runs/mine/manifests --cache runs/mine/cache/img48 --epochs 40
  fer-nb ensemble search runs/mine/teachers/* --manifest runs/mine/manifests --out runs/mine/ensembles/best
  fer-nb student summarise runs/mine/students
  fer-nb predict group.jpg                                         the faces of a picture and what they show
  fer-nb demo                                                      the same live, from a camera
  fer-nb adapt finetune --data faces --out runs/mine/adapted       a folder of your own faces, a folder a class
  fer-nb status runs                                               which runs there are, how far, and how good
  fer-nb gates runs/embedded                                       the go/no-go checklist, with the file behind each line

exit codes: 0 done, 1 a gate stays shut or a run failed, 2 a wrong argument, 3 some pictures of `predict` could not be read"""


def missing(module, extra, what): return f"{what} needs {module}, which is not installed: pip install 'fer_nb[{extra}]'"


def require_extra(extra, what, modules=None):
    "Stop where a module of an extra is not installed, with the line that installs it."
    def there(module):
        try: return importlib.util.find_spec(module) is not None
        except ImportError: return False
    gone = next((m for m in modules or NEEDS[extra] if not there(m)), None)
    if gone: raise GateError(missing(gone, extra, what))


def manifest_build(a):
    from fer_nb.manifests import build_manifest
    from fer_nb.runs import source_of
    sources = [source_of(s) if Path(s).exists() else s for s in a.source]
    print(build_manifest(sources, a.out, name=a.name, seed=a.seed, val_fraction=a.val_fraction,
                         test_fraction=a.test_fraction, conventions=_conventions(a.convention)))


def _conventions(given):
    "SOURCE=NAME, several, as a mapping."
    pairs = [g.partition("=") for g in given]
    for g, (source, equals, name) in zip(given, pairs):
        if not (source and equals and name): raise UsageError(f"--convention {g!r}: write SOURCE=NAME, such as mine=ferplus")
    return {source: name for source, _, name in pairs}


def manifest_validate(a):
    if a.shard or a.merge:
        if a.sample is not None or a.shard and a.merge: raise UsageError("--shard and --merge go with neither --sample nor one another")
        from fer_nb.shards import merge_validation, validate_shard
        return print(merge_validation(a.dir) if a.merge else f"part: {_short(validate_shard(a.dir, a.shard))}")
    from fer_nb.audit import validate_manifest
    print(validate_manifest(a.dir, sample=a.sample))


def manifest_audit(a):
    from fer_nb.audit import audit_manifest
    print(audit_manifest(a.dir, **({} if a.max_hamming is None else {"max_hamming": a.max_hamming})))


def cache(a):
    from fer_nb.geometry import Geometry
    from fer_nb.images import pack_cache, unseen_by
    from fer_nb.manifests import load_manifest
    manifest, bar = load_manifest(a.manifest, valid=True), sys.stderr.isatty()
    print(packed := pack_cache(manifest, Geometry(size=a.img_size), a.out, sample=a.framing_sample, progress=bar))
    if names := unseen_by(packed): print(f"not measured: how {' and '.join(names)} cut these faces (a detector's file lies in the folder "
                                         f"that FER_NB_MODELS names); fer-nb framing {a.out} does it later")


def status(a):
    from fer_nb.status import status
    print(status(a.run_dir, not a.fast))


def gates(a):
    from fer_nb.gates import gates
    checklist = gates(a.run_dir)
    print(checklist)
    return 0 if checklist.go else 1


def _choose_device(device: str):
    "Let every stage see this device alone: it then takes it by itself, and no setting of the run changes."
    if device == "auto": return
    require_device(device)
    os.environ["CUDA_VISIBLE_DEVICES"] = "" if device == "cpu" else device.partition(":")[2] or os.environ.get("CUDA_VISIBLE_DEVICES", "0")


def require_device(device: str):
    "Refuse a device that is not there."
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device): raise UsageError(f"--device '{device}': give auto, cpu, cuda or cuda:1")
    if not device.startswith("cuda"): return
    import torch
    n = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if int(device.partition(":")[2] or 0) >= n:
        raise UsageError(f"--device {device}: this machine has {n or 'no'} CUDA device{'s' if n > 1 else ''}; give auto or cpu")


def run(a):
    _choose_device(a.device)
    if not a.dry_run: refuse_held(a.out or f"runs/{Path(a.profile).stem}")  # before anything heavy is loaded
    from fer_nb.progress import span
    from fer_nb.runs import run_profile
    start = time.time()
    report = run_profile(a.profile, a.data, a.out, a.cores, a.dry_run, a.convention, a.cluster)
    if a.dry_run: return
    from fer_nb.status import outcome
    print(f"\ndone in {span(time.time() - start)}\n{outcome(report.parent.parent, sys.argv[0])}")


@contextmanager
def _told_when_done(out):
    "Say that a stage has begun, how long it took, and where it failed."
    start, out = time.time(), _short(out)
    print(f"  started  {out}", flush=True)
    try: yield
    except Exception as e:
        print(f"  failed   {out} in {time.time() - start:.0f} s", flush=True)
        for line in (getattr(e, "told", "") or _line(e)[0]).splitlines(): print(f"    | {line}", flush=True)
        raise
    print(f"  done     {out} in {time.time() - start:.0f} s", flush=True)


def _epoch(out):
    "Says an epoch of a stage."
    return lambda line: print(f"  epoch    {_short(out)} {line}", flush=True)


def notebook(a):
    from fer_nb.runs import check_parameters, notebook_path, run_notebook
    end_with_run()
    parameters = _parameters(a)
    if not os.environ.get(RUN_PID): check_parameters(notebook_path(a.name), parameters)  # before it is said to have begun
    try:
        with _told_when_done(a.out): run_notebook(a.name, a.out, parameters, say=_epoch(a.out))
    except Exception as e:
        if os.environ.get(RUN_PID) and hasattr(e, "told"): return 1  # a job of a run: it is told already
        raise


def _check_training(parameters: dict):
    "What can be known of a training before its kernel starts."
    weights, arch = parameters.get("weights"), parameters.get("arch")
    if weights not in (None, "", "none", "auto") and not Path(weights).is_file():
        raise UsageError(f"weights '{weights}' is no file: give none, auto, or the path of a checkpoint")
    if parameters.get("device"): require_device(parameters["device"])
    if parameters.get("tensorboard"):
        from fer_nb.scalars import require_tensorboard
        require_tensorboard()
    if arch:
        from fer_nb.runs import SHORT_NAMES
        if arch not in SHORT_NAMES:
            from fer_nb.teachers import backbone_name
            backbone_name(arch)
    stage, soft = parameters.get("stage"), parameters.get("softlabels")
    if stage in STAGES and (stage == "CE") == bool(soft):
        raise UsageError(f"stage {stage} {'takes no soft labels: leave out' if soft else 'needs soft labels: give'} --softlabels")


def teacher_train(a):
    name = f"{a.arch}_seed{a.seed}_stage{'B' if a.init_from else 'A'}"
    out = a.out or f"runs/teachers/{name}_{Path(a.cache).name if a.cache else 'embedded'}"
    given = {"manifest_dir": a.manifest, "cache_dir": a.cache, "arch": a.arch, "seed": a.seed, "init_from": a.init_from,
             "stage": "B" if a.init_from else "A", "weights": a.weights, "device": a.device, "epochs": a.epochs, "convention": a.convention,
             "tensorboard": a.tensorboard or None}
    if bool(a.manifest) != bool(a.cache): raise UsageError("give --manifest and --cache together, or neither for the embedded faces")
    _stage("03_teachers", out, {k: v for k, v in given.items() if v not in (None, "")} | _parameters(a))


def teacher_export(a):
    if a.shard and a.merge: raise UsageError("--shard and --merge don't go with one another")
    from fer_nb.shards import export_shard, export_teacher, merge_softlabels
    where = a.manifest, a.cache
    if a.shard or a.merge:
        return print(merge_softlabels(a.run_dir, *where) if a.merge else f"part: {_short(export_shard(a.run_dir, a.shard, *where))}")
    from fer_nb.callbacks import best_device
    from fer_nb.gates import gates
    with hold(a.run_dir): print(export_teacher(a.run_dir, *where, best_device()))
    print(f"\n{gates(a.run_dir)}")


def _stage(name, out, parameters):
    "One papermill run of a stage, then its gates; it resumes, and where all epochs are trained it only calibrates and exports."
    from fer_nb.gates import gates
    from fer_nb.runs import check_parameters, notebook_path, run_notebook
    check_parameters(notebook_path(name), parameters)
    _check_training(parameters)
    if Path(out).is_file(): raise UsageError(f"'{out}' is a file: give a folder")
    executed = Path(out)/f"{name}.ipynb"
    def say(line): print(f"    {line}", flush=True)
    with _told_when_done(executed): run_notebook(name, executed, parameters | {"out": str(out)}, say=say)
    print(f"\n{gates(out)}")


def student_train(a):
    if bool(a.manifest) != bool(a.cache): raise UsageError("give --manifest and --cache together, or neither for the embedded faces")
    if (a.stage == "CE") == bool(a.softlabels):
        raise UsageError(f"stage {a.stage} {'takes no soft labels: leave out' if a.softlabels else 'needs soft labels: give'} --softlabels")
    out = a.out or f"runs/students/mobilenetv3_large_100_{Path(a.cache).name if a.cache else 'embedded'}_seed{a.seed}_{a.stage}"
    given = {"manifest_dir": a.manifest, "cache_dir": a.cache, "stage": a.stage, "softlabels": a.softlabels, "supervision": a.supervision,
             "init_from": a.init_from, "seed": a.seed, "epochs": a.epochs, "convention": a.convention, "device": a.device,
             "tensorboard": a.tensorboard or None}
    _stage("05_students", out, {k: v for k, v in given.items() if v not in (None, "")} | _parameters(a))


def student_evaluate(a):
    if str(a.checkpoint).endswith(".onnx"):
        if not a.through: raise UsageError("an .onnx is judged through detectors: give --through, or the run's folder")
    else:
        from fer_nb.students import evaluate_checkpoint
        if not a.cache: raise UsageError("give --cache: a run's folder is judged on packed images")
        print(evaluate_checkpoint(a.checkpoint, a.manifest, a.cache, a.view, a.source, a.convention, a.class_sets, a.out))
    if a.through:
        from fer_nb.through import judge_through
        print(judge_through(a.checkpoint, a.manifest, list(map(_detector, a.through)), a.view, a.source, a.convention, a.sample, a.out))


def _detector(text):
    "NAME or NAME:WIDTH as (name, width)."
    name, _, width = text.partition(":")
    if width and not width.isdigit(): raise UsageError(f"--through {text}: give a detector, or a detector and its width, such as yunet:320")
    return name, int(width or 640)


def framing(a):
    from fer_nb.images import measure_cache
    from fer_nb.manifests import load_manifest
    manifest = load_manifest(a.manifest)
    if a.model:
        from fer_nb.exporting import learned_grey, reframe, require_trained_on
        require_trained_on(a.model, manifest.dataset_index_id)
    found = measure_cache(a.cache, manifest, a.sample)
    for s in found.sights:
        print(f"{s.name}: found {s.found:,} of {s.seen:,}" + (f", cut {s.crop.ratio:.3f} of its box" if s.measured else ": not measured"))
    if a.model: print(f"written into {reframe(a.model, found, learned_grey(a.model, a.manifest, a.cache))}")


def student_summarise(a):
    from fer_nb.summary import summarise_students
    from fer_nb.summary_plots import through_table
    print(summarise_students(a.dir, a.out, a.resamples))
    if len(table := through_table(a.dir)): print(f"\nthrough detectors:\n{table.to_markdown(index=False)}")


def ensemble_search(a):
    from fer_nb.ensembles import search_ensemble
    print(search_ensemble(a.members, a.manifest, a.out, preset=a.preset, space=a.space, benchmark=a.benchmark, class_aware=a.class_aware,
                          seed=a.seed, ties=a.ties))


def ensemble_export(a):
    from fer_nb.ensembles import export_ensemble
    print(export_ensemble(a.dir, a.manifest))


def ensemble_evaluate(a):
    from fer_nb.ensembles import evaluate_ensemble
    print(evaluate_ensemble(a.dir, a.manifest))


def recount(a):
    from fer_nb.ensembles import recount
    done = recount(a.dir, a.manifest)
    print("\n".join(f"  {row.done:<60} {row.folder}" for row in done.itertuples()))


def export(a):
    from fer_nb.exporting import export_checkpoint
    print(export_checkpoint(a.checkpoint, a.out, a.manifest, a.cache, precisions=a.precision))


def bench(a):
    from fer_nb.timing import time_models
    given = {k: v for k in ("batches", "threads", "providers", "runs") if (v := getattr(a, k)) is not None}
    given["progress"] = sys.stderr.isatty()
    if a.against:
        if not a.manifest: raise UsageError("--against needs test rows: give --manifest")
        require_extra("train", "bench --against")
        from fer_nb.race import race
        return print(race(a.models, a.against, a.manifest, a.convention, a.view, a.out, a.sample, progress=given["progress"]))
    if not a.manifest: return print(time_models(a.models, a.out, **given))
    require_extra("train", "bench --manifest")
    from fer_nb.latency import bench
    print(bench(a.models, a.out, a.manifest, a.view, **given))


def predict(a):
    if bool(a.images) == bool(a.video): raise UsageError("give pictures, or one film with --video")
    for flag, beside in (("draw", "--video"), ("whole", "--video"), ("annotate", "pictures")):
        if getattr(a, flag) and bool(a.video) == (beside == "--video"): raise UsageError(f"--{flag} does not go with {beside}")
    found = _predict_film(a) if a.video else _predict_pictures(a)
    text = found.to_json() if a.json else found.to_csv().rstrip("\n") if a.csv else str(found)
    if a.out:
        from fer_nb.artifacts import write_text
        write_text(a.out, text + "\n")
    else: print(text)
    return found.exit_code


def _told(line): print(line, file=sys.stderr)


def _predict_pictures(a):
    from fer_nb.pictures import predict_pictures
    each = None
    if a.draw or a.consent:
        from fer_nb.written import Drawer
        each = Drawer(a.draw, a.consent)
    return predict_pictures(a.images, a.model, a.detector, a.min_face, whole=a.whole, each=each, say=_told)


def _predict_film(a):
    from fer_nb.written import predict_film
    return predict_film(a.video, a.model, a.detector, a.min_face, a.annotate, a.consent, say=_told)


STABILISER = ("ema", "delta", "window", "min_count", "vote_by")


def _stabiliser(a):
    "The stabiliser's settings that were given."
    if a.window is not None and a.min_count is not None and a.min_count > a.window:
        raise UsageError(f"--min-count {a.min_count} of a window of {a.window} frames can't be: give at most {a.window}")
    return {name: getattr(a, name) for name in STABILISER if getattr(a, name) is not None}


def demo(a):
    if a.browser: return demo_in_browser(a)
    from fer_nb.window import run_demo
    out = None if a.no_log else a.out or f"runs/demo/{time.strftime('%Y%m%d-%H%M%S')}"
    with hold(out) if out else nullcontext():
        run_demo(a.source or "0", a.model, a.detector, out, a.headless, a.seconds, min_face=a.min_face, save_clips=a.save_clips,
                 consent=a.consent, **_stabiliser(a))


def demo_in_browser(a):
    require_extra("notebooks", "demo --browser")
    from fer_nb.page import serve_cell
    if a.headless or a.no_log or a.seconds: raise UsageError("--browser goes with neither --headless nor --no-log nor --seconds")
    serve_cell(a.model, a.source or "browser", a.detector, a.out or "runs/demo", min_face=a.min_face, save_clips=a.save_clips,
               consent=a.consent, **_stabiliser(a))


def score(a):
    from fer_nb.scoring import score_session
    print(score_session(a.session, a.truth))


def replay(a):
    from fer_nb.tuning import replay
    again = replay(a.session, a.truth, **_stabiliser(a))
    if a.out: again.save(a.out)
    print(again)


def tune(a):
    from fer_nb.tuning import tune, tuning_plot
    if a.plot and not (Path(a.plot).parent.is_dir() and Path(a.plot).suffix in (".png", ".svg", ".pdf")):
        raise UsageError(f"--plot '{a.plot}': give a .png, .svg or .pdf in a folder that exists")
    found = tune(a.session, a.jitter_limit, a.truth, vote_by=a.vote_by)
    if a.plot: tuning_plot(found).savefig(a.plot)
    print(found)


def nl_smoke(a):
    from fer_nb.phase import ARMS, nl_smoke
    report = nl_smoke(a.manifest, a.cache, a.out, a.softlabels, a.arms or tuple(ARMS), a.epochs, a.rows, a.batch_size, a.accumulate, a.lr,
                      a.source or None, a.convention, a.amp, a.device, a.seed)
    print(report)
    return int(any(arm.reasons for arm in report.arms.values()))


def nl_gate(a):
    from fer_nb.phase import phase_gate
    twice = [name for name, *_ in a.part if [n for n, *_ in a.part].count(name) > 1]
    if twice: raise UsageError(f"--part {twice[0]} is given twice: give all its runs at once")
    gate = phase_gate(a.baseline, {name: runs for name, *runs in a.part}, a.out, a.margin, a.ece_margin)
    print(gate)
    return int(not gate.passed)


def adapt_mine(a):
    from fer_nb.hard_samples import mine_sessions
    print(mine_sessions(a.sessions, a.out, a.most))


def adapt_films(a):
    from fer_nb.film_collections import collect_films
    print(collect_films(a.data, a.out, a.votes, a.most, a.agreement, a.model, a.detector, a.min_face, a.seed, sys.stderr.isatty()))


def adapt_finetune(a):
    from fer_nb.finetune import FinetuneConfig
    from fer_nb.own_faces import adapt_to_faces
    if bool(a.manifest) != bool(a.cache): raise UsageError("give --manifest and --cache together, or neither: then nothing is replayed")
    adapted = adapt_to_faces(a.data, a.out, a.checkpoint, FinetuneConfig(a.mode, a.epochs), a.manifest or None, a.cache or None,
                             a.convention, strict=a.strict, bar=sys.stderr.isatty(), say=lambda line: print(line, flush=True))
    print(f"\n{adapted}")
    return 0 if adapted.gate.promoted else 1


def adapt_webcams(a):
    from dataclasses import replace

    from fer_nb.webcams import PRACTICE, practise_webcams
    config = replace(PRACTICE, left_out=tuple(a.left_out), epochs=a.epochs or PRACTICE.epochs)
    done = practise_webcams(a.manifest, a.cache, a.out, a.checkpoint, a.rows, a.softlabels, a.every, config, bar=sys.stderr.isatty(),
                            say=lambda line: print(line, flush=True))
    print(f"\n{done}")
    return 0 if done.gate.promoted else 1


def adapt_gate(a):
    from fer_nb.dual_gate import gate_files
    gate = gate_files(a.offline, a.session, a.out, a.truth, a.strict)
    print(gate)
    return 0 if gate.promoted else 1


def report(a):
    from fer_nb import pack, report as page_of
    if len(a.notebook) not in (0, 2) or a.notebook and a.runs: raise UsageError("give a notebook and the HTML page to write, or --runs")
    pages = [page_of.render(*a.notebook)] if a.notebook else pack.render_pack(a.runs or (), a.to, a.out, a.engine or "")
    for page in pages: print(f"report: {_short(page)}")


def keep(a):
    from fer_nb.report import keep_results
    kept = keep_results(a.run_dir, a.out)
    print(f"{len(kept)} files, {sum(p.stat().st_size for p in kept)/1e6:.1f} MB: {_short(a.out)}")


def _short(path):
    "The path as seen from here, if that is shorter."
    path = Path(path)
    return min(str(path), os.path.relpath(path), key=len)


def _parameters(a):
    "Parameters from --parameters (JSON) and -p (name value, the value read as JSON where it is JSON)."
    def value(text):
        try: return json.loads(text)
        except (ValueError, RecursionError): return text
    try: given = json.loads(a.parameters)
    except (ValueError, RecursionError) as e: raise UsageError(f"--parameters is no JSON object: {e}") from None
    if not isinstance(given, dict): raise UsageError("--parameters is no JSON object: give {\"name\": value}")
    return {**given, **{k: value(v) for k, v in a.p}}


GROUPS = {"manifest": "build, validate and audit the table of all images", "teacher": "train one teacher; export its softlabels",
          "ensemble": "weigh teachers, write what they teach together, judge it",
          "student": "train one student; judge any checkpoint; compare ways of teaching over seeds",
          "nl": "NL and negative learning: a smoke test before, a gate after each part alone",
          "adapt": "to a camera or faces of one's own: find mistakes, fine-tune, judge the result"}


def _teacher_flags(c):
    flags(c, "03_teachers", "arch manifest<manifest_dir cache<cache_dir convention out init_from weights epochs? seed device tensorboard",
          weights={"default": None}, init_from={"metavar": "RUN_DIR"}, device=DEVICES)
    given(c)


DEVICES = {"help": "auto, cpu, cuda or cuda:N; auto takes CUDA where there is one"}


def _export_flags(c):
    elsewhere = {"help": "if it stands elsewhere than at training"}
    flags(c, "03_teachers", ".run_dir<out manifest<manifest_dir cache<cache_dir", run_dir={"help": "a teacher's run"},
          manifest=elsewhere, cache=elsewhere)
    _shard_flags(c)


def _student_flags(c):
    flags(c, "05_students",
          "stage manifest<manifest_dir cache<cache_dir softlabels supervision init_from convention out epochs? seed device tensorboard",
          stage={"choices": STAGES}, supervision={"choices": ("fused", "split")}, device=DEVICES)
    given(c)


def _evaluate_flags(c):
    flags(c, "students.evaluate_checkpoint", ".checkpoint manifest<manifest_dir! cache<cache_dir view source convention "
          "class_sets<class_conditional out", checkpoint={"metavar": "RUN"}, cache={"required": False})
    flags(c, "through.judge_through", "through<detectors+ sample", through={
        "default": [], "metavar": "DETECTOR", "type": str,
        "help": "also on faces that a detector has to find: yunet, yunet:320 (pixels that it sees; 640 where none is said), haar, dnn"})


def _framing_flags(c):
    flags(c, "images.measure_cache", ".cache<folder manifest! sample")
    c.add_argument("--model", metavar="FILE", help="also write it into an .onnx that was exported from a run on these pictures")


def _bench_flags(c):
    flags(c, "latency.bench", ".models+ manifest<manifest_dir view out", models={"metavar": "MODEL", "type": str})
    flags(c, "latency.measure_latency", "batches+? threads+? providers+? runs?", batches={"type": ranged(int, "batches"), "metavar": "N"},
          threads={"type": ranged(int, "threads"), "metavar": "N"}, providers={"metavar": "NAME"})
    flags(c, "race.race", "against convention sample", against={"metavar": "YAML"}, sample={"type": ranged(int, "sample"), "metavar": "N"})


def _predict_flags(c):
    flags(c, "pictures.predict_pictures", ".images<paths+ model detector min_face whole", images={"metavar": "IMAGE", "nargs": "*"})
    flags(c, "written.predict_film", "video? annotate consent", video={"metavar": "FILM"}, annotate={"metavar": "FILM"})
    c.add_argument("--draw", metavar="DIR", default="", help="draw the pictures with boxes and labels into this folder: only together with "
                                                             "--consent")
    form = c.add_mutually_exclusive_group()
    form.add_argument("--json", action="store_true", help="all probabilities, as JSON")
    form.add_argument("--csv", action="store_true", help="all probabilities, as CSV: a row a face")
    c.add_argument("--out", metavar="FILE", help="write the answer to this file")


VOTE_BY = {"choices": ("frames", "seconds"), "metavar": "UNIT"}


def _stabiliser_flags(c): flags(c, "stabiliser.Stabiliser", "ema? delta? window? min_count? vote_by?", vote_by=VOTE_BY)


def _demo_flags(c):
    flags(c, "realtime.open_pipeline", "model detector min_face save_clips consent")
    flags(c, "window.run_demo", "source? out? headless seconds", source={
        "metavar": "WHAT",
        "help": "a camera's number, a video, a picture, a folder, synthetic:SECONDS (default: camera 0, or the browser's)"},
        out={"help": "the session's folder (default: runs/demo/DATE-TIME)"})
    c.add_argument("--browser", action="store_true", help="a page in the browser in place of the window, with the browser's own camera")
    c.add_argument("--no-log", action="store_true", help="write nothing at all")
    _stabiliser_flags(c)


def _replay_flags(c):
    flags(c, "tuning.replay", ".session<folder truth")
    _stabiliser_flags(c)
    c.add_argument("--out", metavar="CSV", help="write the labels, a row a frame")


def _tune_flags(c):
    flags(c, "tuning.tune", ".session<folder truth jitter_limit vote_by?", vote_by=VOTE_BY)
    c.add_argument("--plot", metavar="FILE", help="draw the heat map, EMA against hysteresis, as .png, .svg or .pdf")


def _finetune_flags(c):
    flags(c, "own_faces.adapt_to_faces", "data! out! checkpoint manifest<mix_manifest cache<mix_cache convention strict",
          checkpoint={"metavar": "PATH"})
    flags(c, "finetune.FinetuneConfig", "mode epochs")


def _webcams_flags(c):
    flags(c, "webcams.practise_webcams", "manifest! cache! out! checkpoint rows softlabels every", checkpoint={"metavar": "PATH"},
          rows={"type": ranged(int, "most")})
    flags(c, "finetune.FinetuneConfig", "epochs? left_out+", left_out={
        "default": ["backlight", "low_resolution"], "nargs": "*", "metavar": "KIND"})


def _gate_flags(c):
    pairs = {"nargs": 2, "type": str, "metavar": ("INCUMBENT", "CANDIDATE")}
    flags(c, "dual_gate.gate_files", "offline*! session<sessions* truth out! strict", offline=pairs, session=pairs,
          out={"help": "a folder for dual_gate.json"})


def _smoke_flags(c):
    flags(c, "phase.nl_smoke", "manifest<manifest_dir! cache<cache_dir! out! softlabels arms+ epochs rows batch_size accumulate lr source "
          "convention amp device seed", arms={"metavar": "ARM", "default": None}, amp={"choices": ("no", "bf16", "fp16")})


def _phase_flags(c):
    flags(c, "phase.phase_gate", "baseline+! part<parts* out margin ece_margin", baseline={"metavar": "RUN"},
          part={"nargs": "+", "action": "append", "type": str, "metavar": ("NAME", "RUN"), "required": True,
                "help": "a part and its run folders, such as NL RUN RUN RUN; may be repeated"})


def _report_flags(c):
    flags(c, "pack.render_pack", "runs+ to out engine", to={"choices": ("html", "pdf", "all"), "metavar": None},
          runs={"metavar": "DIR", "default": None}, engine={"choices": ("quarto", "pandoc"), "metavar": None, "default": None})
    c.add_argument("notebook", nargs="*", help="in place of --runs: an executed report notebook, and the HTML page to make of it")


def _shard_flags(c):
    c.add_argument("--shard", default="", metavar="K/N", help="only the K-th of N consecutive parts, for as many machines")
    c.add_argument("--merge", action="store_true", help="put the parts together, to what one machine would have written")


def _validate_flags(c):
    flags(c, "audit.validate_manifest", ".dir<folder sample")
    _shard_flags(c)


def _run_flags(c):
    flags(c, "runs.run_profile", "profile<name! data* convention<conventions* out cores dry_run cluster")
    c.add_argument("--device", default="auto", metavar="DEVICE", **DEVICES)


def _status_flags(c):
    flags(c, "status.status", ".run_dir<runs_dir")
    c.add_argument("--fast", action="store_true", help="leave go or no-go out, for which every file is read again")


def _notebook_flags(c):
    flags(c, "runs.run_notebook", ".name .out", name={"metavar": "NOTEBOOK"}, out={"metavar": "OUT"})
    given(c)


COMMANDS = {  # name -> (what is called, whose docstring is its help, its flags)
    "manifest build": (manifest_build, "manifests.build_manifest", lambda c: flags(
        c, "manifests.build_manifest", "source<sources*! convention<conventions* out! name seed val_fraction test_fraction",
        source={"metavar": "KIND=PATH"}, convention={"metavar": "SOURCE=NAME"})),
    "manifest validate": (manifest_validate, "audit.validate_manifest", _validate_flags),
    "manifest audit": (manifest_audit, "audit.audit_manifest", lambda c: flags(
        c, "audit.audit_manifest", ".dir<folder max_hamming")),
    "cache": (cache, "Pack the pictures of a manifest, prepared for training, and measure how detectors frame them.", lambda c: flags(
        c, "02a_images", "manifest<manifest_dir! out! img_size framing_sample", framing_sample={
            "default": 1000, "help": "training pictures that the detectors at hand look at"},
        manifest={"help": "a frozen and validated manifest"}, out={"help": "the cache's folder"})),
    "framing": (framing, "images.measure_cache", _framing_flags),
    "teacher train": (teacher_train, "Train one teacher, or go on with it, then calibrate and export it.", _teacher_flags),
    "teacher export": (
        teacher_export, "Calibrate a trained teacher again and write its softlabels for every split and view.", _export_flags),
    "ensemble search": (ensemble_search, "ensembles.search_ensemble", lambda c: flags(
        c, "ensembles.search_ensemble", ".members<member_dirs+ manifest<manifest_dir! out! preset space benchmark class_aware ties seed",
        members={"metavar": "RUN_DIR"}, benchmark={"metavar": "VIEW"})),
    "ensemble export": (ensemble_export, "ensembles.export_ensemble", lambda c: flags(
        c, "ensembles.export_ensemble", ".dir<folder manifest<manifest_dir!")),
    "ensemble evaluate": (ensemble_evaluate, "ensembles.evaluate_ensemble", lambda c: flags(
        c, "ensembles.evaluate_ensemble", ".dir<folder manifest<manifest_dir!")),
    "student train": (student_train, "Train one student in one stage, or go on with it, then calibrate it.", _student_flags),
    "student evaluate": (student_evaluate, "students.evaluate_checkpoint", _evaluate_flags),
    "student summarise": (student_summarise, "summary.summarise_students", lambda c: flags(
        c, "summary.summarise_students", ".dir<folder out resamples")),
    "recount": (recount, "ensembles.recount", lambda c: flags(c, "ensembles.recount", ".dir<folder manifest<manifest_dir!")),
    "run": (run, "runs.run_profile", _run_flags),
    "status": (status, "status.status", _status_flags),
    "export": (export, "exporting.export_checkpoint", lambda c: flags(
        c, "exporting.export_checkpoint", ".checkpoint manifest<manifest_dir cache<cache_dir precision<precisions*? out",
        checkpoint={"metavar": "RUN"}, precision={"choices": ("fp32", "fp16", "w8", "int8"), "metavar": None, "default": None,
                                                 "help": "again for each of several; not given: all that can be had"})),
    "bench": (bench, "latency.bench", _bench_flags),
    "predict": (predict, "pictures.predict_pictures", _predict_flags),
    "demo": (demo, "window.run_demo", _demo_flags),
    "score": (score, "scoring.score_session", lambda c: flags(c, "scoring.score_session", ".session<folder truth")),
    "replay": (replay, "tuning.replay", _replay_flags),
    "tune": (tune, "tuning.tune", _tune_flags),
    "nl smoke": (nl_smoke, "phase.nl_smoke", _smoke_flags),
    "nl gate": (nl_gate, "phase.phase_gate", _phase_flags),
    "adapt mine": (adapt_mine, "hard_samples.mine_sessions", lambda c: flags(
        c, "hard_samples.mine_sessions", ".sessions+ out most", sessions={
            "metavar": "SESSION", "help": "folders of labelled sessions"})),
    "adapt films": (adapt_films, "film_collections.collect_films", lambda c: flags(
        c, "film_collections.collect_films", "data<root! out! votes most agreement<least_agreement model detector min_face seed",
        votes={"choices": ["face", "voice", "clip"]})),
    "adapt finetune": (adapt_finetune, "own_faces.adapt_to_faces", _finetune_flags),
    "adapt webcams": (adapt_webcams, "webcams.practise_webcams", _webcams_flags),
    "adapt gate": (adapt_gate, "dual_gate.gate_files", _gate_flags),
    "gates": (gates, "gates.gates", lambda c: flags(c, "gates.gates", ".run_dir")),
    "notebook": (notebook, "runs.run_notebook", _notebook_flags),
    "report": (report, "pack.render_pack", _report_flags),
    "keep": (keep, "report.keep_results", lambda c: flags(c, "report.keep_results", ".run_dir<runs_dir .out")),
}


def _checked(fill, name, extra):
    "Flags that are made only where the command can run."
    def checked(c):
        require_extra(extra, name, ("pandas",) if name in TABLES else NEEDS[extra])
        fill(c)
    return checked


def parser():
    p = Parser(prog="fer-nb", description="Facial expression recognition that people can trust: from images to evidence.", epilog=EPILOG,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--version", action="version", version=f"fer-nb {metadata.version('fer_nb')}")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub = p.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    places = {g: sub.add_parser(g, help=h).add_subparsers(metavar="ACTION", required=True, parser_class=Parser) for g, h in GROUPS.items()}
    for name, (func, about, fill) in COMMANDS.items():
        group, _, action = name.rpartition(" ")
        about = about_function(about) if re.fullmatch(r"\w+\.\w+", about) else about
        c = places.get(group, sub).add_parser(action, help=about[0].lower() + about[1:].rstrip("."), description=about)
        c.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        c.set_defaults(func=func)
        c.fill = fill if name in CORE else _checked(fill, name, "notebooks" if name in TABLES else "train")
    return p


def _import_line(e: ImportError) -> str:
    "What to install; empty where nothing that can be named is missing."
    if "libGL" in str(e): return "OpenCV with windows needs libGL.so.1: pip install opencv-python-headless in place of opencv-python"
    module = (e.name or "").partition(".")[0]
    return next((missing(module, extra, "this") for extra, modules in NEEDS.items() if module in modules), "")


def _line(e: BaseException) -> tuple[str, int]:
    "What a failure comes to in one line, and its exit code."
    if isinstance(e, FerError): return str(e), e.exit_code
    if isinstance(e, ImportError) and (line := _import_line(e)): return line, 1
    if isinstance(e, OSError):
        where = " → ".join(str(f) for f in (e.filename, e.filename2) if f)
        return f"{where}: {e.strerror or e}" if where else f"{type(e).__name__}: {e.strerror or e}", 1
    if isinstance(e, UnicodeDecodeError): return f"a file is not UTF-8: {e.reason} at byte {e.start}", 2
    if type(e).__name__ == "ValidationError" and hasattr(e, "errors"):  # pydantic's
        first = e.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}", 2
    if isinstance(e, MemoryError): return "the memory is not enough for this", 1
    first = (str(e).splitlines() or [""])[0]
    return f"a fault of fer-nb itself ({type(e).__name__}: {first}): with --debug the same command shows where", 1


ASKED = ("run_dir", "dir", "softlabels", "init_from", "truth", "sessions", "baseline")


def _check_places(a):
    "Refuse a path that is not there, and a file where a folder is to be made, before anything is imported for it."
    for name in ASKED:
        given = getattr(a, name, None)
        for path in given if isinstance(given, list) else [given]:
            if path and not Path(path).exists(): raise UsageError(f"'{path}' does not exist ({name.replace('_', ' ')})")
    if not (out := getattr(a, "out", None)): return
    above = Path(out).parents if a.func in (replay, notebook, predict) else (Path(out), *Path(out).parents)  # those three write a file
    if at := next((p for p in above if p.is_file()), None): raise UsageError(f"'{at}' is a file: give a folder")


def _speak_plainly():
    "What the terminal's encoding lacks is written as its number, and ends nothing."
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"): stream.reconfigure(errors="backslashreplace")


def _onnx_folder(a):
    path = Path(a.checkpoint)
    return a.out or (path if path.is_dir() else path.parent)/"onnx"


def _there(folder):
    "A folder that is written where it stands; none where it is missing, which the command says itself."
    return folder if Path(folder).is_dir() else None


WRITES = {  # the folder that a command writes, where it is known before it starts; a stage's notebook holds its own
    **dict.fromkeys((manifest_build, ensemble_search, student_evaluate, bench, nl_smoke, nl_gate, adapt_mine, adapt_films, adapt_finetune,
                     adapt_webcams, adapt_gate, keep), lambda a: a.out),
    **dict.fromkeys((manifest_validate, manifest_audit, ensemble_export, ensemble_evaluate, recount), lambda a: _there(a.dir)),
    **dict.fromkeys((score, tune), lambda a: _there(a.session)),
    student_summarise: lambda a: a.out or _there(a.dir), export: _onnx_folder}


def _held(a):
    "The hold on the folder that a command writes."
    folder = WRITES[a.func](a) if a.func in WRITES else None
    return hold(folder) if folder and (not Path(folder).exists() or os.access(folder, os.W_OK)) else nullcontext()


def main(argv=None):
    _speak_plainly()
    warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)  # inside fastai and timm
    debug = "--debug" in (sys.argv if argv is None else argv)
    try:
        args = parser().parse_args(argv)
        _check_places(args)
        with _held(args): return args.func(args) or 0
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("fer-nb: interrupted; the same command goes on from here", file=sys.stderr)
        return 130
    except Exception as e:
        if debug: raise
        line, code = _line(e)
        print(f"fer-nb: {line}", file=sys.stderr)
        return code


if __name__ == "__main__":
    sys.exit(main())
