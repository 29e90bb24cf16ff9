"""The command `fer-nb`: a thin cover over the notebooks' functions. Imports wait until a command needs them."""
import argparse
import importlib.util
import json
import os
import sys
import time
import warnings
from importlib import metadata
from pathlib import Path

from fer_nb.artifacts import STAGES, FerError, GateError, UsageError

NEEDS = {"notebooks": ("matplotlib", "anywidget", "ipywidgets", "voila"),
         "train": ("torch", "timm", "fastai", "pandas", "pyarrow", "scipy", "sklearn", "matplotlib", "onnx", "onnxscript",
                   "onnxconverter_common", "threadpoolctl", "papermill", "nbformat", "ipykernel", "IPython", "snakemake", "yaml",
                   "pypandoc", "PIL")}  # what each extra brings, as it is imported

EPILOG = """examples:
  fer-nb run --profile embedded                                    the whole chain on faces that it draws itself
  fer-nb run --profile fer2013 --data fer2013.zip --data ferplus.zip
  fer-nb manifest build --source fer2013_folder=fer2013.zip --source ferplus=ferplus.zip --out runs/mine/manifests
  fer-nb teacher train --arch B3 --manifest runs/mine/manifests --cache runs/mine/cache/img48 --epochs 40
  fer-nb ensemble search runs/mine/teachers/* --manifest runs/mine/manifests --out runs/mine/ensembles/best
  fer-nb student summarise runs/mine/students
  fer-nb predict group.jpg                                         the faces of a picture and what they show
  fer-nb demo                                                      the same live, from a camera
  fer-nb gates runs/embedded                                       the go/no-go checklist, with the file behind each line

exit codes: 0 done, 1 a gate stays shut or a run failed, 2 a wrong argument"""


def require_extra(extra, what):
    "Stop where a module of an extra is not installed, with the line that installs it."
    def there(module):
        try: return importlib.util.find_spec(module) is not None
        except ImportError: return False
    gone = [m for m in NEEDS[extra] if not there(m)]
    if gone: raise GateError(missing(gone[0], extra, what))


def missing(module, extra, what): return f"{what} needs {module}, which is not installed: pip install 'fer_nb[{extra}]'"


def manifest_build(a):
    from fer_nb.manifests import build_manifest
    print(build_manifest(a.source, a.out, name=a.name, seed=a.seed, val_fraction=a.val_fraction, conventions=_conventions(a.convention)))


def _conventions(given):
    "SOURCE=NAME, several, as a mapping."
    pairs = [g.partition("=") for g in given]
    for g, (source, equals, name) in zip(given, pairs):
        if not (source and equals and name): raise UsageError(f"--convention {g!r}: write SOURCE=NAME, such as mine=ferplus")
    return {source: name for source, _, name in pairs}


def manifest_validate(a):
    from fer_nb.audit import validate_manifest
    print(validate_manifest(a.dir, sample=a.sample))


def manifest_audit(a):
    from fer_nb.audit import audit_manifest
    print(audit_manifest(a.dir, **({} if a.max_hamming is None else {"max_hamming": a.max_hamming})))


def gates(a):
    from fer_nb.gates import gates
    checklist = gates(a.run_dir)
    print(checklist)
    return 0 if checklist.go else 1


def run(a):
    from fer_nb.runs import run_profile
    start = time.time()
    report = run_profile(a.profile, a.data, a.out, a.cores, a.dry_run, a.convention)
    if not a.dry_run: print(f"done in {(time.time() - start)/60:.1f} min; report: {_short(report)}")


def notebook(a):
    from fer_nb.runs import run_notebook
    start, out = time.time(), _short(a.out)
    print(f"  started  {out}", flush=True)
    run_notebook(a.name, a.out, _parameters(a))
    print(f"  done     {out} in {time.time() - start:.0f} s", flush=True)


def teacher_train(a):
    name = f"{a.arch}_seed{a.seed}_stage{'B' if a.init_from else 'A'}"
    out = a.out or f"runs/teachers/{name}_{Path(a.cache).name if a.cache else 'embedded'}"
    given = {"manifest_dir": a.manifest, "cache_dir": a.cache, "arch": a.arch, "seed": a.seed, "init_from": a.init_from,
             "stage": "B" if a.init_from else "A", "weights": a.weights, "epochs": a.epochs, "convention": a.convention}
    if bool(a.manifest) != bool(a.cache): raise UsageError("give --manifest and --cache together, or neither for the embedded faces")
    _teacher(out, {k: v for k, v in given.items() if v not in (None, "")} | _parameters(a))


def teacher_export(a):
    from fer_nb.records import RunArgs
    from fer_nb.runs import notebook_parameters, notebook_path
    known = notebook_parameters(notebook_path("03_teachers"))
    used = {k: v for k, v in RunArgs.load(a.run_dir).parameters.items() if k in known}
    given = {k: v for k, v in (("manifest_dir", a.manifest), ("cache_dir", a.cache)) if v}
    for k, flag in (("manifest_dir", "--manifest"), ("cache_dir", "--cache")):
        if k not in used | given: raise UsageError(f"{a.run_dir}/args.json names no {k}: give {flag}")
    _teacher(a.run_dir, used | given)


def _teacher(out, parameters):
    "One papermill run of 03_teachers; it resumes, and where all epochs are trained it only calibrates and exports."
    from fer_nb.gates import gates
    from fer_nb.runs import run_notebook
    start = time.time()
    print(f"  started  {_short(out)}", flush=True)
    run_notebook("03_teachers", Path(out)/"03_teachers.ipynb", parameters | {"out": str(out)}, bar=sys.stderr.isatty())
    print(f"  done     {_short(out)} in {time.time() - start:.0f} s\n\n{gates(out)}")


def student_train(a):
    from fer_nb.gates import gates
    from fer_nb.runs import run_notebook
    if bool(a.manifest) != bool(a.cache): raise UsageError("give --manifest and --cache together, or neither for the embedded faces")
    if (a.stage == "CE") == bool(a.softlabels):
        raise UsageError(f"stage {a.stage} {'takes no soft labels: leave out' if a.softlabels else 'needs soft labels: give'} --softlabels")
    out = a.out or f"runs/students/mobilenetv3_large_100_{Path(a.cache).name if a.cache else 'embedded'}_seed{a.seed}_{a.stage}"
    given = {"manifest_dir": a.manifest, "cache_dir": a.cache, "stage": a.stage, "softlabels": a.softlabels, "supervision": a.supervision,
             "init_from": a.init_from, "seed": a.seed, "epochs": a.epochs, "convention": a.convention}
    start = time.time()
    print(f"  started  {_short(out)}", flush=True)
    run_notebook("05_students", Path(out)/"05_students.ipynb",
                 {k: v for k, v in given.items() if v not in (None, "")} | _parameters(a) | {"out": str(out)}, bar=sys.stderr.isatty())
    print(f"  done     {_short(out)} in {time.time() - start:.0f} s\n\n{gates(out)}")


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
        from fer_nb.exporting import reframe, require_trained_on
        require_trained_on(a.model, manifest.dataset_index_id)
    found = measure_cache(a.cache, manifest, a.sample)
    for s in found.sights:
        print(f"{s.name}: found {s.found:,} of {s.seen:,}" + (f", cut {s.crop.ratio:.3f} of its box" if s.measured else ": not measured"))
    if a.model: print(f"written into {reframe(a.model, found)}")


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
    if not a.manifest: return print(time_models(a.models, a.out, **given))
    require_extra("train", "bench --manifest")
    from fer_nb.latency import bench
    print(bench(a.models, a.out, a.manifest, a.view, **given))


def predict(a):
    from fer_nb.pictures import predict_pictures
    found = predict_pictures(a.images, a.model, a.detector, a.min_face, whole=a.whole, say=lambda line: print(line, file=sys.stderr))
    print(found.to_json() if a.json else found)
    return 0 if found.found else 1


STABILISER = (("ema", float, "weight of the past"), ("delta", float, "lead that a new label needs"), ("window", int, "labels that vote"),
              ("min_count", int, "votes that a label needs"))


def _stabiliser(a):
    "The stabiliser's settings that were given."
    return {name: getattr(a, name) for name, *_ in STABILISER if getattr(a, name) is not None}


def demo(a):
    if a.browser: return demo_in_browser(a)
    from fer_nb.window import run_demo
    out = None if a.no_log else a.out or f"runs/demo/{time.strftime('%Y%m%d-%H%M%S')}"
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
    found = tune(a.session, a.jitter_limit, a.truth)
    if a.plot: tuning_plot(found).savefig(a.plot)
    print(found)


def report(a):
    from fer_nb.report import render
    print(f"report: {_short(render(a.notebook, a.html))}")


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
        except ValueError: return text
    try: given = json.loads(a.parameters)
    except ValueError as e: raise UsageError(f"--parameters is no JSON object: {e}") from None
    if not isinstance(given, dict): raise UsageError("--parameters is no JSON object: give {\"name\": value}")
    return {**given, **{k: value(v) for k, v in a.p}}


class Parser(argparse.ArgumentParser):
    "Usage errors in one line that names the remedy."
    def error(self, message):
        print(f"fer-nb: {message} (see '{self.prog} --help')", file=sys.stderr)
        sys.exit(2)


def parser():
    p = Parser(prog="fer-nb", description="Facial expression recognition that people can trust: from images to evidence.", epilog=EPILOG,
               formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--version", action="version", version=f"fer-nb {metadata.version('fer_nb')}")
    p.add_argument("--debug", action="store_true", help="show the traceback of an error")
    sub = p.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)

    def command(where, name, func, about, needs="train"):
        c = where.add_parser(name, help=about, description=about[0].upper() + about[1:] + ".")
        c.add_argument("--debug", action="store_true", default=argparse.SUPPRESS, help=argparse.SUPPRESS)
        c.set_defaults(func=func, needs=needs, called=c.prog.partition(" ")[2])
        return c

    def parameters(c):
        c.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="one parameter; may be repeated")
        c.add_argument("--parameters", default="{}", metavar="JSON", help="many parameters, as a JSON object")

    def stabiliser(c):
        for name, kind, about in STABILISER: c.add_argument(f"--{name.replace('_', '-')}", type=kind, metavar="X", help=about)

    m = sub.add_parser("manifest", help="build, validate and audit the table of all images").add_subparsers(metavar="ACTION", required=True)
    c = command(m, "build", manifest_build, "read datasets into one frozen manifest of seven classes")
    c.add_argument("--source", action="append", required=True, metavar="KIND=PATH", help="a dataset (folder or zip); may be repeated")
    c.add_argument("--convention", action="append", default=[], metavar="SOURCE=NAME",
                   help="whose labels a source has, where it is not the usual convention of its kind; may be repeated")
    c.add_argument("--out", required=True, metavar="DIR", help="folder for the manifest and its reports")
    c.add_argument("--name", default="dataset", help="first part of the dataset_index_id (default: %(default)s)")
    c.add_argument("--seed", type=int, default=1337, help="of the validation split (default: %(default)s)")
    c.add_argument("--val-fraction", type=float, default=0.1, help="share of the training part (default: %(default)s)")
    c = command(m, "validate", manifest_validate, "check that every image exists, decodes, is unchanged, and has one of the seven labels")
    c.add_argument("dir", metavar="DIR", help="a manifest folder")
    c.add_argument("--sample", type=int, metavar="N", help="check N random rows instead of all")
    c = command(m, "audit", manifest_audit, "find identical and near-identical images across splits, sources and labels")
    c.add_argument("dir", metavar="DIR", help="a manifest folder")
    c.add_argument("--max-hamming", type=int, metavar="BITS", help="perceptual hashes that differ in at most so many bits are near")

    c = command(sub, "framing", framing, "let detectors look at packed training pictures; how to cut their boxes is written into the cache")
    c.add_argument("cache", metavar="CACHE", help="a packed cache")
    c.add_argument("--manifest", required=True, metavar="DIR", help="the manifest that it was packed from")
    c.add_argument("--sample", type=int, default=1000, metavar="N", help="training pictures to look at (default: %(default)s)")
    c.add_argument("--model", metavar="FILE", help="also write it into an .onnx that was exported from a run on these pictures")

    t = sub.add_parser("teacher", help="train one teacher; export its softlabels").add_subparsers(metavar="ACTION", required=True)
    c = command(t, "train", teacher_train, "train one teacher, or go on with it, then calibrate and export it")
    c.add_argument("--arch", default="RN18", help="RN18, RN50, B3, CNXT, VIT or a timm model name (default: %(default)s)")
    c.add_argument("--manifest", default="", metavar="DIR", help="a frozen manifest (default: embedded faces are drawn)")
    c.add_argument("--cache", default="", metavar="DIR", help="its packed images")
    c.add_argument("--convention", default="", metavar="NAME", help="whose labels it learns, where the manifest has several conventions")
    c.add_argument("--out", default="", metavar="DIR", help="the run's folder (default: below runs/teachers)")
    c.add_argument("--init-from", default="", metavar="RUN_DIR", help="stage A's run: makes this stage B")
    c.add_argument("--weights", metavar="WHICH", help="none, auto (timm's) or the path of a checkpoint")
    c.add_argument("--epochs", type=int, metavar="N")
    c.add_argument("--seed", type=int, default=1337, help="(default: %(default)s)")
    parameters(c)
    c = command(t, "export", teacher_export, "calibrate a trained teacher again and write its softlabels for every split and view")
    c.add_argument("run_dir", metavar="RUN_DIR", help="a teacher's run")
    c.add_argument("--manifest", default="", metavar="DIR", help="if it stands elsewhere than at training")
    c.add_argument("--cache", default="", metavar="DIR", help="if it stands elsewhere than at training")

    e = sub.add_parser("ensemble", help="weigh teachers, write what they teach together, judge it")
    e = e.add_subparsers(metavar="ACTION", required=True)
    c = command(e, "search", ensemble_search, "gate the members and choose their weights on the benchmark")
    c.add_argument("members", nargs="+", metavar="RUN_DIR", help="teachers' runs")
    c.add_argument("--manifest", required=True, metavar="DIR", help="the frozen manifest of all members")
    c.add_argument("--out", required=True, metavar="DIR", help="the ensemble's folder")
    c.add_argument("--preset", help="pairwise, three_way or four_way: fixed weights instead of a search")
    c.add_argument("--space", default="logit", help="logit or probability (default: %(default)s)")
    c.add_argument("--benchmark", default="val", metavar="VIEW", help="the view that chooses (default: %(default)s)")
    c.add_argument("--class-aware", action="store_true", help="also try one weight a class")
    c.add_argument("--ties", type=float, default=1.0, metavar="ERRORS",
                   help="standard errors of macro-F1 that count as a tie, to be broken by NLL (default: %(default)s)")
    c.add_argument("--seed", type=int, default=1337, help="(default: %(default)s)")
    for name, func, about in (("export", ensemble_export, "write the fused softlabels and the split targets"),
                              ("evaluate", ensemble_evaluate, "report the ensemble and its members on test rows, and seal the folder")):
        c = command(e, name, func, about)
        c.add_argument("dir", metavar="DIR", help="an ensemble's folder")
        c.add_argument("--manifest", required=True, metavar="DIR", help="the frozen manifest of all members")

    s = sub.add_parser("student", help="train one student; judge any checkpoint; compare ways of teaching over seeds")
    s = s.add_subparsers(metavar="ACTION", required=True)
    c = command(s, "train", student_train, "train one student in one stage, or go on with it, then calibrate it")
    c.add_argument("--stage", default="CE", choices=STAGES, help="(default: %(default)s)")
    c.add_argument("--manifest", default="", metavar="DIR", help="a frozen manifest (default: embedded faces are drawn)")
    c.add_argument("--cache", default="", metavar="DIR", help="its packed images")
    c.add_argument("--softlabels", default="", metavar="DIR", help="KD, DKD: the softlabels folder of a teacher or an ensemble")
    c.add_argument("--supervision", default="fused", choices=("fused", "split"),
                   help="split: an ensemble's members apart (default: %(default)s)")
    c.add_argument("--init-from", default="", metavar="FILE", help="a best.pt to start from, as KD does from CE's (default: from scratch)")
    c.add_argument("--convention", default="", metavar="NAME", help="whose labels it learns, where the manifest has several conventions")
    c.add_argument("--out", default="", metavar="DIR", help="the run's folder (default: below runs/students)")
    c.add_argument("--epochs", type=int, metavar="N")
    c.add_argument("--seed", type=int, default=1337, help="(default: %(default)s)")
    parameters(c)
    c = command(s, "evaluate", student_evaluate, "judge a finished run on any view, raw and scaled, with selective prediction")
    c.add_argument("checkpoint", metavar="RUN", help="a run's folder, or its best.pt; teachers too; with --through also an .onnx")
    c.add_argument("--manifest", required=True, metavar="DIR", help="a frozen manifest")
    c.add_argument("--cache", metavar="DIR", help="its packed images, of the model's size")
    c.add_argument("--through", nargs="+", default=[], metavar="DETECTOR",
                   help="also on faces that a detector has to find: yunet, yunet:320 (pixels that it sees; default 640), haar, dnn")
    c.add_argument("--sample", type=int, default=1500, metavar="N", help="pictures for --through; 0: all (default: %(default)s)")
    c.add_argument("--view", default="test_all_sources", help="rows to judge it on (default: %(default)s)")
    c.add_argument("--source", metavar="NAME", help="one source only")
    c.add_argument("--convention", metavar="NAME", help="whose labels judge (default: the source's, or those that the model learned)")
    c.add_argument("--class-sets", action="store_true", help="prediction sets that promise their coverage to each class")
    c.add_argument("--out", metavar="DIR", help="a folder for metrics, confusion and logits (default: nothing is written)")
    c = command(s, "summarise", student_summarise, "means, intervals and differences over seeds, of all students below a folder")
    c.add_argument("dir", metavar="DIR", help="a folder of student runs")
    c.add_argument("--out", metavar="DIR", help="where the tables go (default: the folder itself)")
    c.add_argument("--resamples", type=int, default=10_000, metavar="N", help="of the bootstrap over pictures (default: %(default)s)")

    c = command(sub, "recount", recount, "draw finished runs' intervals by picture, split their sets by convention")
    c.add_argument("dir", metavar="DIR", help="a folder of runs and ensembles, or of small copies")
    c.add_argument("--manifest", required=True, metavar="DIR", help="the frozen manifest of all of them")

    c = command(sub, "run", run, "walk the chain of a profile; what is up to date is skipped")
    c.add_argument("--profile", required=True, help="a name in profiles/, or a YAML file")
    c.add_argument("--data", action="append", default=[], metavar="PATH", help="a dataset's zip or folder (or KIND=PATH); may be repeated")
    c.add_argument("--convention", action="append", default=[], metavar="NAME",
                   help="whose labels to learn, in place of the profile's list; may be repeated")
    c.add_argument("--out", default="", metavar="DIR", help="run folder (default: runs/PROFILE)")
    c.add_argument("--cores", type=int, metavar="N", help="cores to use (default: all)")
    c.add_argument("--dry-run", action="store_true", help="only say what would run")

    c = command(sub, "export", export, "write a finished run as ONNX, in fp32, fp16 and int8, and compare the files with it")
    c.add_argument("checkpoint", metavar="RUN", help="a student's or teacher's folder, or its best.pt")
    c.add_argument("--manifest", metavar="DIR", help="a frozen manifest: training faces for int8, test faces for the comparison")
    c.add_argument("--cache", metavar="DIR", help="its packed images, of the model's size")
    c.add_argument("--precision", action="append", choices=("fp32", "fp16", "int8"), help="may be repeated (default: all that can be had)")
    c.add_argument("--out", metavar="DIR", help="where the files go (default: onnx, beside the checkpoint)")
    c = command(sub, "bench", bench, "time exported models against each other, interleaved in one process", needs=None)
    c.add_argument("models", nargs="+", metavar="MODEL", help="exported .onnx files")
    c.add_argument("--batches", type=int, nargs="+", metavar="N", help="faces at once (default: 1 8)")
    c.add_argument("--threads", type=int, nargs="+", metavar="N", help="(default: 1 and all)")
    c.add_argument("--providers", nargs="+", metavar="NAME", help="cpu, cuda, dml or a full name (default: all that are here)")
    c.add_argument("--runs", type=int, metavar="N", help="of each model (default: 200)")
    c.add_argument("--manifest", metavar="DIR", help="a frozen manifest: also compare how often the models are right")
    c.add_argument("--view", default="test_all_sources", metavar="VIEW", help="about these of its faces (default: %(default)s)")
    c.add_argument("--out", metavar="DIR", help="where the tables go (default: beside the first model)")

    c = command(sub, "predict", predict, "find the faces of pictures and say what they show; exits 1 when there is none in any", needs=None)
    c.add_argument("images", nargs="+", metavar="IMAGE")
    c.add_argument("--model", default="", metavar="FILE", help="an .onnx, or a run's best.pt (default: the student that comes along)")
    c.add_argument("--detector", default="auto", metavar="NAME", help="auto, yunet, dnn, haar (default: %(default)s)")
    c.add_argument("--min-face", type=float, default=48, metavar="PIXELS", help="leave smaller faces out (default: %(default)s)")
    c.add_argument("--whole", action="store_true", help="the pictures are faces already: don't look for any")
    c.add_argument("--json", action="store_true", help="all probabilities, as JSON")

    c = command(sub, "demo", demo, "label faces live, in a window or without one; numbers are logged, no pictures", needs=None)
    c.add_argument("--source", metavar="WHAT",
                   help="a camera's number, a video, a picture, a folder, synthetic:SECONDS (default: camera 0, or the browser's)")
    c.add_argument("--model", default="", metavar="FILE", help="an .onnx, or a run's best.pt (default: the student that comes along)")
    c.add_argument("--detector", default="auto", metavar="NAME",
                   help="auto (YuNet, or Haar without it), yunet, dnn, haar (default: %(default)s)")
    c.add_argument("--headless", action="store_true", help="no window")
    c.add_argument("--browser", action="store_true", help="a page in the browser in place of the window, with the browser's own camera")
    c.add_argument("--out", default="", metavar="DIR", help="the session's folder (default: runs/demo/DATE-TIME)")
    c.add_argument("--no-log", action="store_true", help="write nothing at all")
    c.add_argument("--seconds", type=float, metavar="S", help="stop after so much of the source's time (with --headless)")
    c.add_argument("--min-face", type=float, default=96, metavar="PIXELS", help="leave smaller faces out (default: %(default)s)")
    stabiliser(c)
    c.add_argument("--save-clips", action="store_true", help="keep the pictures as video; only together with --consent")
    c.add_argument("--consent", action="store_true", help="everybody in front of the camera has agreed to that")

    def session(name, func, about):
        c = command(sub, name, func, about, needs=None)
        c.add_argument("session", metavar="SESSION", help="a demo's folder")
        c.add_argument("--truth", metavar="CSV", help="an events.csv to judge by, in place of the session's own labels")
        return c

    session("score", score, "score a session fairly: labels near a transition don't count, (unstable) does")
    c = session("replay", replay, "compute a session's labels again from its probabilities, with other settings where given")
    stabiliser(c)
    c.add_argument("--out", metavar="CSV", help="write the labels, a row a frame")
    c = session("tune", tune, "search the stabiliser's settings for the best macro-F1 at a jitter limit")
    c.add_argument("--jitter-limit", type=float, default=30, metavar="N", help="label changes a minute (default: %(default)s)")
    c.add_argument("--plot", metavar="FILE", help="draw the heat map, EMA against hysteresis, as .png, .svg or .pdf")

    c = command(sub, "gates", gates, "print the go/no-go checklist of a run folder; exits 1 on any NO-GO", needs=None)
    c.add_argument("run_dir", metavar="RUN_DIR", help="a run, or a folder of runs")

    c = command(sub, "notebook", notebook, "run one notebook with parameters, and refuse names that it does not have")
    c.add_argument("name", metavar="NOTEBOOK", help="a stage such as 03_teachers, or a path")
    c.add_argument("out", metavar="OUT", help="the executed notebook")
    parameters(c)

    c = command(sub, "report", report, "turn an executed report notebook into one HTML page")
    c.add_argument("notebook", metavar="NOTEBOOK", help="an executed 09b_report.ipynb")
    c.add_argument("html", metavar="HTML", help="the page to write")

    c = command(sub, "keep", keep, "copy the small results of a run folder: JSON, CSV, the page and test logits, no weights, no images")
    c.add_argument("run_dir", metavar="RUN_DIR", help="a profile's run folder, with its report")
    c.add_argument("out", metavar="OUT", help="the folder to fill")
    return p


def import_problem(e, what):
    "What to install, in one line; None where nothing that can be named is missing."
    if "libGL" in str(e):
        return "OpenCV with windows needs libGL.so.1: pip uninstall opencv-python, then pip install --force-reinstall opencv-python-headless"
    module = (e.name or "").partition(".")[0]
    return next((missing(module, extra, what) for extra, modules in NEEDS.items() if module in modules), None)


def main(argv=None):
    args = parser().parse_args(argv)
    warnings.filterwarnings("ignore", message=".*torch.jit", category=FutureWarning)  # inside fastai and timm
    try:
        if args.needs: require_extra(args.needs, args.called)
        return args.func(args) or 0
    except FerError as e:
        if args.debug: raise
        print(f"fer-nb: {e}", file=sys.stderr)
        return e.exit_code
    except ImportError as e:
        line = import_problem(e, args.called)
        if args.debug or not line: raise
        print(f"fer-nb: {line}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        print("fer-nb: interrupted; the same command goes on from here", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
