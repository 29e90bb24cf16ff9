"""Three seeds as three jobs of a real SLURM on this machine, one of them preempted; and what is refused before anything is queued."""
import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import pandas as pd
import pytest
import yaml

from fer_nb import runs
from fer_nb.artifacts import GateError, UsageError, write_text
from fer_nb.cluster import JobLogs, StuckJobs, load_cluster, require_plugin, require_scheduler, rules_of
from fer_nb.geometry import Geometry
from fer_nb.images import pack_cache
from fer_nb.leaves import check_seal
from fer_nb.locks import end_with_parent
from fer_nb.manifests import build_manifest, load_manifest
from fer_nb.progress import Forecast, Walk
from fer_nb.synthetic import write_dataset
from tests.conftest import ROOT

DAEMONS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "sinfo", "scancel")
SLURM_CONF = """
ClusterName=fer_nb
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket={at}/munge/socket,cred_expire=5
StateSaveLocation={at}/state
SlurmdSpoolDir={at}/spool
SlurmctldPidFile={at}/slurmctld.pid
SlurmdPidFile={at}/slurmd.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
ReturnToService=2
KillWait=5
MinJobAge=7200
SchedulerParameters=sched_interval=2,batch_sched_delay=1
GresTypes=gpu
NodeName={host} NodeAddr=127.0.0.1 CPUs=2 RealMemory=4000 Gres=gpu:2 State=UNKNOWN
PartitionName=cpu Nodes={host} Default=YES MaxTime=60 State=UP
PartitionName=gpu Nodes={host} MaxTime=60 State=UP
"""
GRES_CONF = "Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n"  # two cards for the scheduler to hand out; nobody computes on them
EPOCHS, SEEDS = 10, (1, 2, 3)


def free_ports(n):
    with contextlib.ExitStack() as stack:
        there = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in there: s.bind(("127.0.0.1", 0))
        return [s.getsockname()[1] for s in there]


def answer(*command): return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout


def until(true, seconds, what):
    "Wait for something, and say what it was if it never came."
    end = time.monotonic() + seconds
    while not (got := true()):
        assert time.monotonic() < end, f"waited {seconds} s for {what}"
        time.sleep(0.1)
    return got


@pytest.fixture(scope="module")
def scheduler(tmp_path_factory):
    "SLURM with a node of two cores and two cards in two partitions: on the loopback, in a folder of its own, gone with this process."
    gone = [d for d in DAEMONS if not shutil.which(d, path=f"{os.environ['PATH']}:/usr/sbin")]
    if gone: pytest.skip(f"SLURM is not installed (no {gone[0]}): apt-get install slurm-wlm")
    pytest.importorskip("snakemake_executor_plugin_slurm", reason="pip install 'fer_nb[slurm]'")
    at = tmp_path_factory.mktemp("slurm")
    for name, mode in (("munge", 0o711), ("state", 0o755), ("spool", 0o755), ("bin", 0o755)): (at/name).mkdir(mode=mode)
    (at/"munge"/"key").write_bytes(os.urandom(1024))
    (at/"munge"/"key").chmod(0o400)
    conf = at/"slurm.conf"
    conf.write_text(SLURM_CONF.format(at=at, host=socket.gethostname().partition(".")[0], user=getpass.getuser(), ports=free_ports(2)))
    (at/"gres.conf").write_text(GRES_CONF)
    # inside a job the plugin forgets SLURM_CONF, which a real cluster has in /etc
    (at/"bin"/"srun").write_text(f'#!/bin/sh\nSLURM_CONF={conf} exec {shutil.which("srun")} "$@"\n')
    (at/"bin"/"srun").chmod(0o755)
    with pytest.MonkeyPatch.context() as patch, contextlib.ExitStack() as running:
        patch.setenv("SLURM_CONF", str(conf))
        patch.setenv("PATH", f"{at/'bin'}:{os.environ['PATH']}:/usr/sbin")
        m = at/"munge"
        for command in (["munged", "--foreground", "--force", f"--key-file={m/'key'}", f"--socket={m/'socket'}", f"--pid-file={m/'pid'}",
                         f"--log-file={m/'log'}", f"--seed-file={m/'seed'}"], ["slurmctld", "-D", "-c", "-f", str(conf)],
                        ["slurmd", "-D", "-c", "-f", str(conf)]):
            log = running.enter_context(open(at/f"{command[0]}.log", "w"))
            p = subprocess.Popen(command, stdout=log, stderr=log, preexec_fn=partial(end_with_parent, signal.SIGTERM, os.getpid()))
            running.callback(p.wait, 30)
            running.callback(p.terminate)
            if command[0] == "munged": until((m/"socket").exists, 20, "munged")
        try:
            until(lambda: answer("sinfo", "-h", "-o", "%T").strip() == "idle", 60, "an idle node")
            yield at
        finally:
            subprocess.run(["scancel", "--signal=KILL", "--full", "-u", getpass.getuser()], capture_output=True)
            subprocess.run(["scancel", "-u", getpass.getuser()], capture_output=True)
            until(lambda: not answer("squeue", "-h"), 60, "jobs that were cancelled")


@pytest.fixture
def profile(tmp_path):
    "The profile that ships, on one small node without accounting: partitions and cards are as it asks for them."
    settings = yaml.safe_load((ROOT/"workflow"/"slurm"/"config.yaml").read_text())
    settings |= {"cores": 2, "latency-wait": 5, "slurm-status-command": "squeue", "slurm-no-account": True,
                 "slurm-init-seconds-before-status-checks": 2}
    for at in (settings["default-resources"], settings["set-resources"]["student"]): at |= {"mem_mb": 1500, "runtime": 50}
    settings["set-threads"] = dict.fromkeys(settings["set-threads"], 1)
    write_text(tmp_path/"node"/"config.yaml", yaml.safe_dump(settings))
    return tmp_path/"node"


@pytest.fixture
def run(tmp_path):
    "A run folder that has its manifest and its packed faces, so that three students are all there is to do."
    write_dataset(tmp_path/"faces", n=210, size=32)
    tiny = {"img_size": 32, "threads": 1, "stages": {"CE": {"epochs": EPOCHS}}, "seeds": list(SEEDS)}
    config = runs.chain_config(runs.complete_profile(tiny, "tiny"), [f"synthetic={tmp_path/'faces'}"])
    folder = tmp_path/"run"
    build_manifest(config["sources"], folder/"manifests")
    pack_cache(load_manifest(folder/"manifests", valid=True), Geometry(size=32), folder/"cache"/"img32", sample=0)
    write_text(folder/"profile.yaml", yaml.safe_dump(config))
    return folder


def student(run, seed): return run/"students"/f"mobilenetv3_large_100_img32_seed{seed}_CE"


def epochs(run, seed):
    "The lines of history that are written."
    with contextlib.suppress(FileNotFoundError): return (student(run, seed)/"history.csv").read_text().splitlines()[1:]
    return []


def jobs(): return dict(re.findall(r"(\d+) (\w+)", answer("squeue", "-h", "--states=all", "-o", "%i %T")))


def preempt(run, seed):
    "Take a student's node away once it has three epochs, and say what it had by then."
    logs = run/".snakemake"/"slurm"
    log = until(lambda: [p for p in logs.rglob(f"*_{seed}/*.log") if len(epochs(run, seed)) >= 3], 1800, "three epochs")[0]
    assert answer("scontrol", "requeue", log.stem) == ""
    until(lambda: jobs()[log.stem] != "RUNNING", 60, "the preempted job to leave its node")
    return log, epochs(run, seed)


@pytest.mark.timeout(3600)  # against standing still: three trainings, on a machine that others may be using
def test_three_seeds_are_three_jobs_and_a_preempted_one_goes_on(scheduler, profile, run, capsys):
    cluster = load_cluster(str(profile), ROOT/"workflow")
    require_scheduler(cluster)
    targets = [str((student(run, s)/"hash_manifest.json").relative_to(run)) for s in SEEDS]
    walk, others = Walk(Forecast([], 2, 210), queued=True), set(jobs())
    taken = []
    aside = threading.Thread(target=lambda: taken.append(preempt(run, 2)))
    aside.start()
    with walk, JobLogs(cluster.logs(run), walk.hear):
        command = [*runs._command(run/"profile.yaml", run, cluster.cores, cluster), "--quiet", "rules", "host", "progress", "reason", "--"]
        failed = runs._snakemake([*command, *targets], walk.hear, cluster=cluster)
    aside.join()
    said = capsys.readouterr().out
    assert not failed and taken, said[-3000:]
    log, before = taken[0]
    mine = [state for number, state in jobs().items() if number not in others]
    assert len(mine) == 3 and set(mine) == {"COMPLETED"}
    told = answer("scontrol", "show", "job", log.stem)
    assert re.search(r"Restarts=1 ", told) and "Partition=gpu" in told and re.search(r"TresPerJob=gres.gpu:1\b", told)
    for seed in SEEDS:
        check_seal(student(run, seed))
        assert list(pd.read_csv(student(run, seed)/"history.csv")["epoch"]) == list(range(EPOCHS))
    assert 3 <= len(before) < EPOCHS, "it was taken away too late to show anything"
    kept = len(before) - 1  # the last line is written before its checkpoint, so that epoch may be trained again
    assert epochs(run, 2)[:kept] == before[:kept], "it began anew"
    assert [line.split(",")[:7] for line in epochs(run, 2)[:len(before)]] == [line.split(",")[:7] for line in before], "to other weights"
    again = [int(n) for n in re.findall(rf"seed2_CE/05_students.ipynb epoch (\d+) of {EPOCHS}", log.read_text())]
    assert kept + 1 <= again[0] <= len(before) + 2 and again[-1] == EPOCHS
    assert [len(re.findall(rf"seed{s}_CE/05_students.ipynb  done in", said)) for s in SEEDS] == [1, 1, 1], said
    assert f"seed1_CE/05_students.ipynb: epoch {EPOCHS} of {EPOCHS}" in said and not re.search("slurm|account|Job", said, re.I), said


@contextlib.contextmanager
def queued(cluster, run, seed):
    "A student's job on the scheduler; on leaving, all that is queued or runs is cancelled."
    target = str((student(run, seed)/"hash_manifest.json").relative_to(run))
    command = [*runs._command(run/"profile.yaml", run, cluster.cores, cluster), "--", target]
    p = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)
    try: yield
    finally:
        subprocess.run(["scancel", "-u", getpass.getuser()], capture_output=True)
        os.killpg(p.pid, signal.SIGKILL)
        p.wait()
    until(lambda: not answer("squeue", "-h"), 60, "cancelled jobs to be gone")


@pytest.mark.timeout(1800)
def test_a_job_whose_walltime_is_over_goes_on_from_its_last_epoch(scheduler, profile, run):
    config = yaml.safe_load((run/"profile.yaml").read_text())
    config["stages"]["CE"]["epochs"] = 10_000  # more than a minute's on any machine
    write_text(run/"profile.yaml", yaml.safe_dump(config))
    cluster = load_cluster(str(profile), ROOT/"workflow")

    def heard():
        "Epochs by job, of the jobs that train, in their order."
        logs = sorted(cluster.logs(run).rglob("*.log"), key=lambda p: int(p.stem))
        told = {p.stem: [int(n) for n in re.findall(r"epoch (\d+) of 10000", p.read_text())] for p in logs}
        return {job: epochs for job, epochs in told.items() if len(epochs) > 1}

    told = []
    with queued(cluster, run, 1), JobLogs(cluster.logs(run), told.append):
        first = next(iter(until(heard, 1200, "a job that trains")))
        assert answer("scontrol", "update", f"JobId={first}", "TimeLimit=1") == ""  # minutes: now that it trains, on a slow machine, too
        until(lambda: len(heard()) > 1, 1200, "a second job that trains")
        (_, before), (second, after) = heard().items()
        assert jobs()[first] == "TIMEOUT"
    assert [line for line in told if line.startswith("SLURM")] == [
        f"SLURM's job {first}: its walltime was over (runtime); job {second} goes on with its stage (student mobilenetv3_large_100_1)"]
    assert 1 < after[0] <= before[-1] + 2, "it began anew"


@pytest.mark.timeout(300)
def test_a_job_that_asks_for_more_time_than_its_partition_gives_is_told_of(scheduler, profile, run):
    settings = yaml.safe_load((profile/"config.yaml").read_text())
    settings["set-resources"]["student"]["runtime"] = 61  # minutes, and the partition gives an hour
    write_text(profile/"config.yaml", yaml.safe_dump(settings))
    cluster, told = load_cluster(str(profile), ROOT/"workflow"), []
    with queued(cluster, run, 1), StuckJobs(run, told.append, every=0.5): until(lambda: told, 120, "the word that it will not start")
    assert len(told) == 1 and "student" in told[0]
    assert re.search(r"waits and will not start: it asks for more .*runtime.*; Partition(TimeLimit|Config)", told[0])


@pytest.mark.timeout(300)
def test_a_partition_that_is_not_there_is_refused_before_anything_is_queued(scheduler, profile):
    settings = yaml.safe_load((profile/"config.yaml").read_text())
    settings["set-resources"] = {"teacher": {"slurm_partition": "gpus"}}
    write_text(profile/"config.yaml", yaml.safe_dump(settings))
    before = set(jobs())  # what other tests have queued and left stays in the list for two hours
    with pytest.raises(UsageError, match=r"no partition 'gpus' \(it has cpu, gpu\): change it in"):
        require_scheduler(load_cluster(str(profile), ROOT/"workflow"))
    assert set(jobs()) == before


def test_the_profile_that_ships_names_every_rule_that_takes_cores():
    cluster, rules = load_cluster("slurm", ROOT/"workflow"), rules_of((ROOT/"workflow"/"Snakefile").read_text())
    assert {r for r, threads in rules.items() if threads} == set(cluster.settings["set-threads"])
    trains = {r for r in rules if r.startswith("teacher") or r.endswith("student")}
    assert {r for r, given in cluster.settings["set-resources"].items() if given["gpu"]} == trains and len(trains) == 4
    assert cluster.settings["slurm-requeue"] is True


def fer_nb(*args, path):
    "What the command answers where there is no scheduler."
    return subprocess.run([sys.executable, "-m", "fer_nb.cli", *args], capture_output=True, text=True, cwd=path,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "SLURM_CONF": "/nowhere"})


def test_without_slurm_one_line_says_so(tmp_path, monkeypatch):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    monkeypatch.setenv("PATH", str(tmp_path))
    cluster = load_cluster("slurm", ROOT/"workflow")
    with pytest.raises(GateError, match="SLURM is not here"): require_scheduler(cluster)
    (tmp_path/"sbatch").touch(0o755)
    (tmp_path/"sinfo").write_text("#!/bin/sh\necho 'sinfo: error: no controller' >&2; exit 1\n")
    (tmp_path/"sinfo").chmod(0o755)
    with pytest.raises(GateError, match="SLURM doesn't answer: sinfo: error: no controller"): require_scheduler(cluster)


def test_without_the_plugin_one_line_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(GateError, match=r"pip install 'fer_nb\[slurm\]'"): require_plugin(load_cluster("slurm", ROOT/"workflow"))


@pytest.mark.parametrize(("given", "says"), [("slum", "give slurm, or a folder"), ("mine", "cores is 'many'")])
def test_a_wrong_cluster_is_refused_in_one_line(tmp_path, given, says):
    write_text(tmp_path/"mine"/"config.yaml", "executor: slurm\ncores: many\n")
    done = fer_nb("run", "--profile", "embedded", "--cluster", given, "--dry-run", path=tmp_path)
    assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1
    assert [p.name for p in Path(tmp_path).iterdir()] == ["mine"]


@pytest.mark.timeout(300)
def test_a_dry_run_shows_the_plan_without_a_scheduler(tmp_path):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    done = fer_nb("run", "--profile", "embedded", "--cluster", "slurm", "--dry-run", path=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"\d+ would run, as jobs of slurm in cpu and gpu; nothing was written", done.stdout) and list(tmp_path.iterdir()) == []
