#!/usr/bin/env python3
"""Tests of slurm/ on a real Slurm of two nodes (slurm/testbed), with the demo model. One case per call:

    test_slurm.py CASE --headfold PROGRAM --reference DIR [--source DIR] [--keep]

reference  runs the pipeline with mpirun into DIR: what an undisturbed run gives (needs no Slurm)
scripts    the examples and dry runs; no Slurm either
chain      one slurm/submit; results equal those of the reference
stop       SIGUSR1, scontrol requeue, preemption, STOP: ends in time, goes on, same results
limit      a real time limit of a minute: Slurm's signal before it, and a stage that Slurm ends at it; long, hence only when asked
kill       SIGKILL of a random rank at a random moment of every stage, at ten when asked
node       SIGKILL of a slurmd
disk       a full disk, several times
hang       a rank that sleeps, one that does not answer at all

Python's standard library only. Exit code 77: Slurm is not installed here, (disk) nothing may be mounted, or a long form was not asked for
(HEADFOLD_LONG_TESTS=1; HEADFOLD_SLURM_KILLS=N for another number of kills).
"""

import argparse
import csv
import filecmp
import glob
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time

sys.dont_write_bytecode = True

STAGES = ("calibrate", "convert", "finetune", "evaluate", "report")

# Tiny, but every stage takes a moment, passes through all of its ways to save, and has work for both ranks.
PIPELINE = """[run]
folder = {folder}
model = {source}/demo/models/prose-llama
threads = 1
comm-timeout = {timeout}

[calibrate]
data = {source}/demo/text/calibration.jsonl
samples = 24
seq-len = 64
dtype = float32
pipeline-ranks = 2
save-every = 4

[convert half]
kv-heads = 4

[convert quarter]
kv-heads = 2
key-metric = act
refit = yes
refit-data = {source}/demo/text/calibration.jsonl
refit-samples = 8
seq-len = 64

[finetune healed]
of = quarter
data = {source}/demo/text/calibration.jsonl
dtype = float32
seq-len = 64
batch = 4
micro-batch = 1
steps = 12
checkpoint-every = 3

[evaluate text]
models = original, healed
data = {source}/demo/text/heldout.jsonl
seq-len = 64
limit = 128
dtype = float32

[evaluate glosses]
models = half
task-file = {source}/demo/tasks/glosses.json
tasks = glosses
limit = 60
dtype = float32

[report]
title = test

[resources]
nodes = 2
ntasks-per-node = 1
time = 20
max-requeues = 200

[resources report]
nodes = 1
"""


class Skip(Exception):
    pass


class Missed(Exception):
    """A stage was over before it could be interrupted: nothing was tested, and nothing is wrong."""


def check(condition, message):
    if not condition:
        raise AssertionError(message)


def say(message):
    print("[{:6.1f}] {}".format(time.monotonic() - START, message), flush=True)


START = time.monotonic()
LONG = os.environ.get("HEADFOLD_LONG_TESTS", "") not in ("", "0")


def execute(command, environment=None, code=0):
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
    if code is not None and done.returncode != code:
        raise AssertionError("{} ended with {} instead of {}\n{}{}".format(" ".join(command), done.returncode, code, done.stdout, done.stderr))
    return done.stdout + done.stderr


def wait_for(what, condition, seconds, pause=0.05):
    """What `condition` returns as soon as it is true."""
    end = time.monotonic() + seconds
    while True:
        value = condition()
        if value:
            return value
        check(time.monotonic() < end, "after {} seconds still not: {}".format(seconds, what))
        time.sleep(pause)


def environment_of(process):
    try:
        with open("/proc/{}/environ".format(process), "rb") as file:
            return dict(entry.split("=", 1) for entry in file.read().decode(errors="replace").split("\0") if "=" in entry)
    except OSError:
        return {}


def shared_memory():
    """Names in /dev/shm that no process maps: what a job left behind."""
    names = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    for maps in glob.glob("/proc/[0-9]*/maps"):
        try:
            with open(maps) as file:
                text = file.read()
        except OSError:
            continue
        for name in re.findall(r"/dev/shm/(\S+)", text):
            names.discard(name)
    return names


class Cluster:
    """The two-node Slurm, in a folder that is gone afterwards."""

    def __init__(self, arguments, folder):
        self.arguments = arguments
        self.folder = os.path.join(folder, "bed")
        self.testbed = os.path.join(arguments.source, "slurm", "testbed")
        done = subprocess.run([self.testbed, "start", "--folder", self.folder], stdout=subprocess.PIPE, stderr=subprocess.PIPE, universal_newlines=True)
        if done.returncode == 77 or "did not come up" in done.stderr:
            raise Skip(done.stderr.strip())
        check(done.returncode == 0, "slurm/testbed start failed:\n" + done.stderr)
        self.configuration = os.path.join(self.folder, "slurm.conf")
        self.environment = dict(os.environ, SLURM_CONF=self.configuration, TMPDIR=os.path.join(folder, "tmp"), HEADFOLD=arguments.headfold,
                                HEADFOLD_RESTARTED="1", OMP_WAIT_POLICY="passive")
        for name in ("OMPI_MCA_btl", "HEADFOLD_SITE"):
            self.environment.pop(name, None)
        os.makedirs(self.environment["TMPDIR"])
        self.memory_before = shared_memory()

    def stop(self):
        execute([self.testbed, "stop", "--folder", self.folder] + (["--keep"] if self.arguments.keep else []), code=None)

    def call(self, *command, code=0):
        return execute(list(command), self.environment, code)

    def processes(self, ranks_of=None):
        """Processes of this cluster's jobs: {process: rank}; with `ranks_of` only the ranks of headfold's stage."""
        found = {}
        for entry in os.listdir("/proc"):
            if not entry.isdigit():
                continue
            try:
                with open("/proc/{}/cmdline".format(entry), "rb") as file:
                    command = file.read().decode(errors="replace").split("\0")
                with open("/proc/{}/comm".format(entry)) as file:
                    name = file.read().strip()
            except OSError:
                continue
            if not command[0] or (ranks_of and (name != "headfold" or ranks_of not in command or "--stage" not in command)):
                continue
            variables = environment_of(entry)
            if variables.get("SLURM_CONF") == self.configuration and ("SLURM_JOB_ID" in variables or "slurmstepd" in command[0]):
                found[int(entry)] = int(variables.get("SLURM_PROCID", -1))
        return found

    def check_nothing_left(self, run=None):
        """Of ended jobs; with a finished run not in its folder either."""
        wait_for("no process of a job lives", lambda: not self.processes(), 15)
        # Programs of other tests come and go meanwhile.
        wait_for("nothing is left in /dev/shm, where there is {}".format(sorted(shared_memory() - self.memory_before)),
                 lambda: not shared_memory() - self.memory_before, 10)
        left = [name for folder in ("tmp-n1", "tmp-n2") for name in os.listdir(os.path.join(self.folder, folder))] + os.listdir(self.environment["TMPDIR"])
        check(not left, "left in temporary folders: {}".format(left))
        if not run:
            return
        names = [os.path.join(folder, name) for folder, folders, files in os.walk(run.folder) for name in folders + files]
        left = [name for name in names if re.search(r"\.tmp|\.partial|partial-|/\.token|/\.failures", name[len(run.folder):])]
        check(not left, "temporary files left in the run's folder: {}".format(left))


class Run:
    """One pipeline in a folder of its own."""

    def __init__(self, cluster, folder, retries=0, timeout=20):
        self.cluster = cluster
        self.folder = folder
        os.makedirs(folder, exist_ok=True)
        self.config = write_pipeline(cluster.arguments, folder, timeout)
        self.site = self.config + ".env"
        with open(self.site, "w") as file:
            file.write("export HEADFOLD_MAX_RETRIES={} HEADFOLD_MIN_FREE_GB=0\n".format(retries))
        self.held = {}

    def script(self, name, *options, code=0):
        return self.cluster.call(os.path.join(self.cluster.arguments.source, "slurm", name), "--config", self.config, "--site", self.site, *options, code=code)

    def submit(self, *options):
        output = self.script("submit", *options)
        return output

    def status(self):
        return json.loads(self.script("status", "--json"))["stages"]

    def job(self, stage):
        with open(os.path.join(self.folder, "slurm", "jobs.json")) as file:
            jobs = {job["stage"]: job["id"] for submission in json.load(file)["submissions"] for job in submission["jobs"]}
        return jobs[stage]

    def slurm(self, stage, name=None):
        """Fields of the stage's job: of the task `name` of an array, else of one that runs, else of one that waits."""
        output = self.cluster.call("scontrol", "show", "job", "--oneliner", name or self.job(stage))
        tasks = [dict(field.split("=", 1) for field in line.split(" ") if "=" in field) for line in output.splitlines() if "JobState=" in line]
        order = ("RUNNING", "COMPLETING", "CONFIGURING", "PENDING")
        task = min(tasks, key=lambda one: order.index(one["JobState"]) if one["JobState"] in order else len(order))
        # The number of an array's last task is that of the whole array.
        task["Name"] = "{ArrayJobId}_{ArrayTaskId}".format(**task) if "ArrayTaskId" in task else task["JobId"]
        return task

    def poke(self):
        """Requeued jobs wait two minutes: release them, once nothing of their last start is left (what the two minutes are for)."""
        for line in self.cluster.call("squeue", "--noheader", "--array", "--format=%i %T %r").splitlines():
            job, state, reason = (line.split(None, 2) + ["", ""])[:3]
            if state != "PENDING" or not reason.startswith("BeginTime"):
                self.held.pop(job, None)
            elif time.monotonic() > self.held.setdefault(job, time.monotonic()) + 1 and not self.cluster.processes():
                self.cluster.call("scontrol", "update", "JobId=" + job, "StartTime=now", code=None)

    def ended(self):
        self.poke()
        return not self.cluster.call("squeue", "--noheader").strip()

    def wait(self, seconds=300):
        wait_for("all jobs have ended", self.ended, seconds, 0.2)

    def ranks(self, stage):
        """{process: rank} of the stage, once all of its ranks have started headfold."""
        return self.cluster.processes(stage)

    def wait_for_stage(self, stage, seconds=180):
        """Waits until ranks of a stage compute, releasing requeued jobs; False when the stage has finished instead."""
        def begun():
            ranks = self.ranks(stage)
            if ranks:
                return ranks
            self.poke()
            return "finished" if self.is_finished(stage) else None
        try:
            return wait_for("stage {} begins".format(stage), begun, seconds, 0.1) != "finished"
        except AssertionError as failure:
            raise AssertionError("{}\n{}\n{}".format(failure, self.cluster.call("scontrol", "show", "job"), self.logs(stage)[-3000:]))

    def starts(self, stage):
        """How often a job of the stage has begun to compute."""
        try:
            with open(os.path.join(self.folder, "events.jsonl")) as file:
                return sum(1 for line in file if '"event":"start"' in line and '"stage":"{}-'.format(stage) in line)
        except OSError:
            return 0

    def wait_until_it_computes(self, stage):
        """As wait_for_stage, and then until headfold has read its options and listens; False when the stage finished before."""
        before = self.starts(stage)
        if not self.wait_for_stage(stage):
            return False

        def computes():
            self.poke()
            return self.starts(stage) > before or self.is_finished(stage)
        try:
            wait_for("{} computes".format(stage), computes, 120, 0.1)
        except AssertionError as failure:
            raise AssertionError("{}\n{}\n{}".format(failure, self.cluster.call("scontrol", "show", "job"), self.logs(stage)[-3000:]))
        return not self.is_finished(stage)

    def elements(self, stage):
        return {"convert": 2, "evaluate": 3}.get(stage, 1)

    def is_finished(self, stage):
        return all(os.path.exists(os.path.join(self.folder, "finished", "{}-{}".format(stage, i))) for i in range(self.elements(stage)))

    def logs(self, stage):
        text = ""
        for path in sorted(glob.glob(os.path.join(self.folder, "logs", stage + "-*", "*"))):
            with open(path, errors="replace") as file:
                text += "---- {}\n{}".format(path, file.read())
        return text

    def check_finished(self):
        states = {"{}/{}".format(entry["stage"], entry["name"]): entry["state"] for entry in self.status()}
        check(set(states.values()) == {"finished"}, "not everything is finished: {}\n{}".format(
            states, "".join(self.logs(stage)[-3000:] for stage in STAGES)))


def write_pipeline(arguments, folder, timeout=20):
    path = folder.rstrip("/") + ".ini"
    with open(path, "w") as file:
        file.write(PIPELINE.format(folder=folder, source=arguments.source, timeout=timeout))
    return path


# ------------------------------------------------------------------------------------------------------------------
# Equality of results
# ------------------------------------------------------------------------------------------------------------------

def statistics_of(arguments, folder):
    text = execute([arguments.headfold, "inspect", os.path.join(folder, "calibration.h5"), "--json"], dict(os.environ, HEADFOLD_RESTARTED="1"))
    return json.loads(text[text.index("{"):])


def numbers_of(value, path=""):
    """All numbers of a JSON value, by path."""
    if isinstance(value, dict):
        return {key: number for name, inner in value.items() for key, number in numbers_of(inner, path + "/" + name).items()}
    if isinstance(value, list):
        return {key: number for i, inner in enumerate(value) for key, number in numbers_of(inner, "{}/{}".format(path, i)).items()}
    return {path: value} if isinstance(value, (int, float)) and not isinstance(value, bool) else {}


def results_of(folder):
    """{evaluation: its results} of the newest results file of each."""
    found = {}
    for path in sorted(glob.glob(os.path.join(folder, "evaluation", "**", "results_*.json"), recursive=True)):
        with open(path) as file:
            results = json.load(file)["results"]
        found["/".join(os.path.relpath(path, os.path.join(folder, "evaluation")).split("/")[:2])] = results
    return found


def table_of(folder, name):
    """A table of the report, without the dates in names of results files."""
    with open(os.path.join(folder, "report", name)) as file:
        return list(csv.reader(re.sub(r"_\d{4}-\d\d-\d\dT[\d.-]+(?=\.json)", "", line) for line in file))


def check_equal(arguments, reference, folder):
    """Statistics to 1e-12, weights to the byte, scores and the report's tables exactly."""
    ours, theirs = statistics_of(arguments, folder), statistics_of(arguments, reference)
    if ours["content_hash"] != theirs["content_hash"]:
        ours, theirs = numbers_of(ours["layers"]), numbers_of(theirs["layers"])
        check(ours.keys() == theirs.keys() and ours, "statistics of other layers")
        for key, value in ours.items():
            check(abs(value - theirs[key]) <= 1e-12 * max(abs(value), abs(theirs[key])), "statistics differ: {} is {!r}, not {!r}".format(key, value, theirs[key]))
    compared = 0
    for part in ("half", "quarter", "healed/adapter", "healed/merged"):
        names = sorted(name for name in os.listdir(os.path.join(reference, part)) if name.endswith(".safetensors") or name == "config.json")
        check(names, "no weights in {}/{}".format(reference, part))
        for name in names:
            compared += 1
            check(filecmp.cmp(os.path.join(reference, part, name), os.path.join(folder, part, name), shallow=False), "{}/{} differs".format(part, name))
    check(compared >= 6, "only {} files were compared".format(compared))
    ours, theirs = results_of(folder), results_of(reference)
    check(len(theirs) == 3 and ours == theirs, "scores differ:\n{}\n{}".format(ours, theirs))
    for name in ("quality.csv", "benchmarks.csv", "layers.csv"):
        expected, found = table_of(reference, name), table_of(folder, name)
        check(expected == found, "report/{} differs:\n{}\n{}".format(name, expected, found))


# ------------------------------------------------------------------------------------------------------------------
# Cases
# ------------------------------------------------------------------------------------------------------------------

def make_reference(arguments):
    folder = arguments.reference
    shutil.rmtree(folder, ignore_errors=True)
    os.makedirs(folder)
    config = write_pipeline(arguments, folder)
    mpirun = [arguments.mpirun, "--allow-run-as-root", "--oversubscribe", "--bind-to", "none", "-np", "2"]
    execute(mpirun + [arguments.headfold, "run", "--config", config], dict(os.environ, HEADFOLD_RESTARTED="1", OMP_WAIT_POLICY="passive"))
    check_equal(arguments, folder, folder)
    times = {}
    with open(os.path.join(folder, "events.jsonl")) as file:
        for line in file:
            event = json.loads(line)
            times.setdefault(event["stage"], []).append(event["time"])
    say("seconds: {}".format({stage: round(moments[-1] - moments[0], 1) for stage, moments in times.items()}))


def directives_of(text):
    options = dict((line[len("#SBATCH --"):].split("=", 1) + [""])[:2] for line in text.splitlines() if line.startswith("#SBATCH --"))
    for name in ("job-name", "output"):
        check(options.pop(name, ""), "no --{} in\n{}".format(name, text))
    if "array" in options:
        members = []
        for part in options["array"].split("%")[0].split(","):
            ends = part.split("-")
            members += range(int(ends[0]), int(ends[-1]) + 1)
        options["array"] = "{}%{}".format(members, options["array"].partition("%")[2])
    return options


def test_scripts(arguments, scratch):
    submit = os.path.join(arguments.source, "slurm", "submit")
    nowhere = dict(os.environ, HEADFOLD=arguments.headfold, HEADFOLD_RESTARTED="1")
    nowhere.pop("HEADFOLD_SITE", None)
    nowhere.pop("SLURM_CONF", None)
    empty = os.path.join(scratch, "empty.env")
    open(empty, "w").close()
    for folder in sorted(glob.glob(os.path.join(arguments.source, "slurm", "examples", "*"))):
        output = execute([submit, "--config", os.path.join(folder, "pipeline.ini"), "--site", empty, "--unchecked", "--dry-run"], nowhere)
        scripts = {re.search(r"/slurm/(\w+)\.sbatch$", part.split("\n")[0]).group(1): part for part in re.split(r"^# (?=/.*\.sbatch$)", output, flags=re.M)[1:]}
        check(sorted(scripts) == sorted(STAGES), "{}: stages {}".format(folder, sorted(scripts)))
        for stage, text in scripts.items():
            with open(os.path.join(folder, stage + ".sbatch")) as file:
                by_hand = file.read()
            check(directives_of(by_hand) == directives_of(text), "{}/{}.sbatch asks for {}, the pipeline for {}".format(
                folder, stage, directives_of(by_hand), directives_of(text)))
            check("HEADFOLD_STAGE={} ".format(stage) in by_hand, "{}/{}.sbatch runs another stage".format(folder, stage))
    # Batch scripts refuse to run outside a job.
    outside = execute(["bash", os.path.join(arguments.source, "slurm", "batch.sh")], {"PATH": os.environ["PATH"]}, code=64)
    check("sbatch" in outside, outside)
    # What cannot be submitted says why, before anything is written.
    run = os.path.join(scratch, "run")
    config = write_pipeline(arguments, run)
    check("no stage 'train'" in execute([submit, "--config", config, "--site", empty, "--only", "train"], nowhere, code=64), "unknown stage")
    check("needs calibrate" in execute([submit, "--config", config, "--site", empty, "--only", "convert", "--dry-run"], nowhere, code=64), "missing stage")
    execute([submit, "--config", config + "x", "--site", empty], nowhere, code=65)
    execute([submit, "--config", config, "--site", empty + "x"], nowhere, code=65)
    execute([submit, "--config", config, "--site", empty, "--dry-run"], dict(nowhere, HEADFOLD_CONTAINER="docker"), code=65)
    execute([submit, "--config", config, "--site", empty, "--dry-run"], dict(nowhere, HEADFOLD_CONTAINER="apptainer"), code=65)
    execute([submit, "--config", config, "--dry-run"], dict(nowhere, HEADFOLD_SITE=""))
    check(not os.path.exists(run), "something was written into {}".format(run))
    # What a stage would refuse is refused now, unless this machine cannot know; status and cancel never ask.
    example = os.path.join(arguments.source, "slurm", "examples", "llama2-7b", "pipeline.ini")
    check("/models/llama2-7b" in execute([submit, "--config", example, "--site", empty, "--dry-run"], nowhere, code=74), "a model that is not there")
    # status and cancel --stop need no Slurm.
    execute([os.path.join(arguments.source, "slurm", "cancel"), "--config", config, "--site", empty, "--stop"], nowhere)
    check(os.path.exists(os.path.join(run, "STOP")), "no STOP file")
    output = execute([os.path.join(arguments.source, "slurm", "status"), "--config", config, "--site", empty], nowhere)
    check("not begun" in output and "STOP is there" in output, output)
    with open("/dev/full", "w") as full:
        done = subprocess.run([os.path.join(arguments.source, "slurm", "status"), "--config", config, "--site", empty], env=nowhere, stdout=full,
                              stderr=subprocess.PIPE, universal_newlines=True)
    check(done.returncode == 74 and len(done.stderr.splitlines()) == 1, "status on a full disk: {} {}".format(done.returncode, done.stderr))
    check_folder_of_batch(arguments, nowhere, scratch)
    check_program_of_batch(arguments, nowhere, scratch)
    check_sites(arguments, nowhere, scratch)
    check_names(arguments, nowhere, scratch)
    check_with_fake_slurm(arguments, nowhere, scratch)
    programs = [os.path.join(arguments.source, "slurm", name) for name in ("testbed", "batch.sh", "site.env.example")]
    programs += glob.glob(os.path.join(arguments.source, "slurm", "examples", "*", "*.sbatch"))
    if shutil.which("shellcheck"):
        execute(["shellcheck"] + programs)
    for program in programs:
        execute(["bash", "-n", program])


def check_folder_of_batch(arguments, environment, scratch):
    """batch.sh finds the folder that headfold itself reads."""
    for i, text in enumerate((
            "[run]\nfolder = out # a comment\n", "[run]\r\nfolder = out\r\n", "[ run ] ; all\n\tfolder\t=\tout \t; a comment\n", "[run]\nfolder=a=b#c;d\n",
            "# folder = x\n[resources]\ntime = 5\n[run]\n;folder = y\nfolder = /nowhere/it's \"a # b\" c # d\n", "[run]\nfolder = ünder way\n")):
        path = os.path.join(scratch, "folder{}.ini".format(i))
        line_end = "\r\n" if "\r" in text else "\n"
        with open(path, "w", newline="") as file:
            file.write(text + "model = {0}/demo/models/prose-llama{1}[calibrate]{1}data = {0}/demo/text/calibration.jsonl{1}".format(arguments.source, line_end))
        expected = json.loads(execute([arguments.headfold, "run", "--config", path, "--list", "--json"], environment))["folder"]
        found = execute(["bash", "-c", 'source "$1"; batch_folder "$2"', "batch", os.path.join(arguments.source, "slurm", "batch.sh"), path],
                        dict(environment, SLURM_JOB_ID="1"))
        check(found == expected + "\n", "batch.sh reads the folder {!r} from {!r}, headfold {!r}".format(found, text, expected))


def check_program_of_batch(arguments, environment, scratch):
    """The scripts of the examples, submitted by hand, start what their repository has built, else what PATH has; a container what it has itself."""
    repository = os.path.join(scratch, "a repository")
    shutil.copytree(os.path.join(arguments.source, "slurm"), os.path.join(repository, "slurm"), ignore=shutil.ignore_patterns("site.env", "__pycache__"))
    built = os.path.join(repository, "build", "release", "jobs", "headfold")
    os.makedirs(os.path.dirname(built))
    programs = os.path.join(scratch, "programs")
    os.makedirs(programs)
    with open(os.path.join(programs, "srun"), "w") as file:
        file.write("#!/bin/bash\nif [[ $1 == --mpi=list ]]; then echo pmix; else printf '<%s>' \"$@\"; fi\n")
    os.chmod(os.path.join(programs, "srun"), 0o755)
    example = os.path.join(repository, "slurm", "examples", "llama2-7b")
    job = {"PATH": programs + ":" + environment["PATH"], "CDPATH": repository, "SLURM_JOB_ID": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_SUBMIT_DIR": example,
           "HEADFOLD_MAX_RETRIES": "0", "HEADFOLD_IMAGE": "image.sif"}

    def check_starts(expected, settings):
        done = subprocess.run(["bash", os.path.join(example, "calibrate.sbatch")], env=dict(job, **settings), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, universal_newlines=True, cwd=scratch)
        check("<{}><run><--config><{}/pipeline.ini><--stage><calibrate>".format(expected, example) in done.stdout,
              "{} is not what is started with {}:\n{}".format(expected, settings, done.stdout))
        check("<headfold-check><{}>".format(expected.split(">")[0]) in done.stdout, "{} is not what is checked with {}:\n{}".format(expected, settings, done.stdout))

    check_starts("headfold", {})
    with open(built, "w") as file:
        file.write("#!/bin/bash\n")
    os.chmod(built, 0o755)
    check_starts(built, {})
    check_starts("/elsewhere/headfold", {"HEADFOLD": "/elsewhere/headfold"})
    check_starts("headfold", {"HEADFOLD_CONTAINER": "pyxis"})
    check_starts("apptainer><exec><--bind><{}><image.sif><headfold".format(example), {"HEADFOLD_CONTAINER": "apptainer"})
    check_starts("apptainer><exec><--bind><{}><image.sif></image/headfold".format(example),
                 {"HEADFOLD_CONTAINER": "apptainer", "HEADFOLD": "/image/headfold"})
    # slurm/submit asks the container's program as well.
    with open(os.path.join(programs, "apptainer"), "w") as file:
        file.write("#!/bin/bash\nprintf '<%s>' \"$@\" >&2\nexit 1\n")
    os.chmod(os.path.join(programs, "apptainer"), 0o755)
    output = execute([os.path.join(repository, "slurm", "submit"), "--config", os.path.join(example, "pipeline.ini"), "--dry-run"],
                     dict(job, HEADFOLD_CONTAINER="apptainer"), code=65)
    check("<image.sif><headfold><run>" in output, "slurm/submit asks another program:\n" + output)


def check_sites(arguments, environment, scratch):
    """Settings whose commands fail are taken as batch.sh takes them; those that bash cannot read are not."""
    config = write_pipeline(arguments, os.path.join(scratch, "sites"))
    for text, code in (("export SBATCH_ACCOUNT=mine\nfalse\n", 0), ("export SBATCH_ACCOUNT=mine\n[[ -n ${NOWHERE:-} ]] && export B=1\n", 0),
                       ("if true\n", 65), ("exit 3\n", 65)):
        site = os.path.join(scratch, "some.env")
        with open(site, "w") as file:
            file.write(text)
        output = execute([os.path.join(arguments.source, "slurm", "submit"), "--config", config, "--site", site, "--dry-run"], environment, code)
        check("--account=mine" in output if code == 0 else re.search("syntax error|exit code 3", output), "{!r}:\n{}".format(text, output))


def check_names(arguments, environment, scratch):
    """Options of sbatch with characters that it would take for a quote or a comment are quoted."""
    for name in ("it's", "run#1", "a b"):
        folder = os.path.join(scratch, name)
        output = execute([os.path.join(arguments.source, "slurm", "submit"), "--config", write_pipeline(arguments, folder), "--dry-run"], environment)
        check('#SBATCH --job-name="{}-report"\n'.format(name) in output and
              '#SBATCH --output="{}/logs/report-0/slurm-%j.out"\n'.format(folder) in output, "the name {!r} is not quoted:\n{}".format(name, output))


# Answers as Slurm's programs do, for jobs that are files and run until they are cancelled.
FAKE_SLURM = """#!/bin/bash
# Starting headfold takes longer than everything else here.
if [[ ${0##*/} == stages ]]; then exec cat "$3.json"; fi
cd "$FAKE_SLURM" || exit 1
if [[ -e down ]]; then echo "slurm_load_jobs error: Unable to contact slurm controller (connect failure)" >&2; exit 1; fi
if [[ -e silent ]]; then exec sleep 60; fi
case "${0##*/} $1 $2" in
  sbatch*)
    id=$(($(cat last 2>/dev/null || echo 100) + 1))
    echo "$id" >last
    echo "${!#}" >"job-$id"
    if [[ -e slow-$id ]]; then sleep 2; fi
    echo "$id"
    ;;
  "scontrol show config") echo "ClusterName             = fake" ;;
  "scontrol show job")
    if [[ ! -e job-$4 ]]; then echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1; fi
    if [[ -e tasks-$4 ]]; then
      while read -r task state; do
        if [[ $task == *,* && ${SLURM_BITSTR_LEN:-64} != 0 ]]; then task=${task%,*}...; fi  # long lists are cut off
        echo "JobId=$4 ArrayJobId=$4 ArrayTaskId=$task JobName=x JobState=$state Reason=None Restarts=0 ExitCode=0:0 StartTime=x Command=$(cat "job-$4") WorkDir=/"
      done <"tasks-$4"
      exit
    fi
    echo "JobId=$4 JobName=x JobState=RUNNING Reason=None Restarts=0 ExitCode=0:0 StartTime=x Command=$(cat "job-$4") WorkDir=/"
    ;;
  squeue*) for job in job-*; do [[ ! -e $job ]] || echo "${job#job-}|$(cat "$job")"; done ;;
  sacct*) [[ ! -e accounting ]] || cat accounting ;;
  scancel*) for job in "$@"; do rm -f "job-${job%%_*}"; done ;;
  *) exit 1 ;;
esac
"""


def check_with_fake_slurm(arguments, environment, scratch):
    """What slurm/submit, status and cancel do when they are interrupted, when Slurm does not answer, and about jobs of other folders."""
    fake = os.path.join(scratch, "fake")
    os.makedirs(fake)
    for name in ("sbatch", "scontrol", "squeue", "scancel", "sacct", "stages"):
        with open(os.path.join(fake, name), "w") as file:
            file.write(FAKE_SLURM)
        os.chmod(os.path.join(fake, name), 0o755)
    environment = dict(environment, PATH=fake + ":" + environment["PATH"], FAKE_SLURM=fake, HEADFOLD_SLURM_TIMEOUT="2",
                       HEADFOLD_ON_LOGIN="stages")

    def write(folder):
        path = write_pipeline(arguments, folder)
        text = execute([arguments.headfold, "run", "--config", path, "--list", "--json"], environment)
        with open(path + ".json", "w") as file:
            file.write(text)
        return path
    folder = os.path.join(scratch, "faked run")
    config = write(folder)

    def command(name, path=config):
        return [os.path.join(arguments.source, "slurm", name), "--config", path]

    def living():
        return sorted(os.path.basename(path) for path in glob.glob(os.path.join(fake, "job-*")))

    def marked(name, there=True):
        path = os.path.join(fake, name)
        open(path, "w").close() if there else os.remove(path)

    def recorded():
        with open(os.path.join(folder, "slurm", "jobs.json")) as file:
            return [job["id"] for submission in json.load(file)["submissions"] for job in submission["jobs"]]

    # A signal while sbatch works: what was submitted is cancelled. After SIGKILL it lives, and the next submission sees it.
    for first, number, code in ((101, signal.SIGINT, 75), (111, signal.SIGTERM, 75), (121, signal.SIGKILL, -signal.SIGKILL)):
        with open(os.path.join(fake, "last"), "w") as file:
            file.write("{}\n".format(first - 1))
        marked("slow-{}".format(first + 1))
        process = subprocess.Popen(command("submit"), env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, universal_newlines=True)
        wait_for("the second job is submitted", lambda: "job-{}".format(first + 1) in living(), 20)
        if number == signal.SIGINT:
            check("another slurm/submit" in execute(command("submit"), environment, code=75), "two submissions at once")
        process.send_signal(number)
        output = process.communicate()[0]
        check(process.returncode == code and "Traceback" not in output, "{}: {}\n{}".format(number, process.returncode, output))
        if number != signal.SIGKILL:
            check(not living() and "2 job(s) submitted before it were cancelled" in output and recorded() == [], "{}: {}\n{}".format(number, living(), output))
    check(len(living()) == 2 and len(recorded()) == 1, "after SIGKILL: {}".format(living()))
    wait_for("its sbatch has ended", lambda: "still wait or run" in execute(command("submit"), environment, code=64), 10)
    execute(command("cancel"), environment)
    check(not living(), "left by cancel: {}".format(living()))
    execute(command("submit"), environment)
    check(len(living()) == 5, "submitted: {}".format(living()))

    # Tasks of an array that were cancelled before Slurm made jobs of them have one line together, before or behind those of the others.
    with open(os.path.join(folder, "slurm", "jobs.json")) as file:
        array = {job["stage"]: job["id"] for submission in json.load(file)["submissions"] for job in submission["jobs"]}["evaluate"]
    tasks = os.path.join(fake, "tasks-" + array)

    def states():
        output = execute(command("status") + ["--json"], environment)
        return [entry["state"] for entry in json.loads(output)["stages"] if entry["stage"] == "evaluate"]

    def check_states(lines, expected):
        for order in (lines, lines[::-1]):
            with open(tasks, "w") as file:
                file.write("".join(line + "\n" for line in order))
            check(states() == expected, "tasks {} are shown as {}, not {}".format(order, states(), expected))

    check_states(["4294967294 CANCELLED", "0 RUNNING"], ["running", "cancelled", "cancelled"])
    check_states(["4294967294 CANCELLED", "0 RUNNING", "1 FAILED"], ["running", "failed", "cancelled"])
    check_states(["4294967294 CANCELLED"], ["cancelled"] * 3)
    for rest in ("1-2", "1,2", "1-2%4", "[1-2%4]", "0-2"):
        check_states([rest + " PENDING", "0 RUNNING"], ["running", "waiting", "waiting"])
    check_states(["0,1,2 PENDING"], ["waiting"] * 3)
    check_states(["0-2 CANCELLED", "1 RUNNING"], ["cancelled", "running", "cancelled"])
    output = execute(command("cancel") + ["--dry-run"], environment)
    check("{}_1".format(array) in output and "{}_0".format(array) not in output and "{}_2".format(array) not in output, output)
    os.remove(tasks)
    # What slurmctld has forgotten, accounting tells in the same notation.
    os.rename(os.path.join(fake, "job-" + array), os.path.join(fake, "forgotten"))
    name = "faked run-evaluate"
    with open(os.path.join(fake, "accounting"), "w") as file:
        file.write("{0}_0|FAILED|1:0|{1}\n{0}_[1-2%4]|CANCELLED by 0|0:0|{1}\n".format(array, name))
    check(states() == ["failed", "cancelled", "cancelled"], "accounting is shown as {}".format(states()))
    os.remove(os.path.join(fake, "accounting"))
    os.rename(os.path.join(fake, "forgotten"), os.path.join(fake, "job-" + array))

    # A copy, whose pipeline names the copied folder, does not touch the original's jobs.
    copy = os.path.join(scratch, "copied run")
    shutil.copytree(folder, copy)
    output = execute(command("cancel", write(copy)), environment)
    check(len(living()) == 5 and "left alone" in output, output)
    # Nor does one whose jobs.json says nothing about the folder.
    path = os.path.join(copy, "slurm", "jobs.json")
    with open(path) as file:
        submissions = json.load(file)["submissions"]
    for submission in submissions:
        del submission["folder"], submission["cluster"]
    with open(path, "w") as file:
        json.dump({"submissions": submissions}, file)
    execute(command("cancel", copy + ".ini"), environment)
    check(len(living()) == 5, "cancelled from a copy: {}".format(living()))

    # No answer is not "no jobs", and nobody waits long for it.
    for state in ("down", "silent"):
        marked(state)
        for name in ("submit", "cancel", "status"):
            start = time.monotonic()
            output = execute(command(name), environment, code=74)
            check(("Unable to contact" if state == "down" else "within 2 seconds") in output and "Traceback" not in output, output)
            check(name != "status" or output.count("unknown") == 8, "status without an answer:\n" + output)
            check(time.monotonic() - start < 10, "{} took {:.1f} s".format(name, time.monotonic() - start))
        marked(state, False)
    check(len(living()) == 5, "lives: {}".format(living()))
    output = execute(command("cancel"), environment)
    check(not living() and output.count("RUNNING") == 5, output)
    check("no job" in execute(command("cancel"), environment), "jobs are left")


def test_chain(arguments, cluster, scratch):
    # Everything must be quoted.
    run = Run(cluster, os.path.join(scratch, "it's a run#1"))
    output = run.submit()
    check(len(re.findall(r"^(?:{}) +\d+ ".format("|".join(STAGES)), output, flags=re.M)) == 5, "no table of jobs:\n" + output)
    check("still wait or run" in run.script("submit", code=64), "a second submission was taken")
    # Jobs that nothing recorded, and those of another folder.
    jobs = os.path.join(run.folder, "slurm", "jobs.json")
    os.rename(jobs, jobs + "x")
    check("still wait or run" in run.script("submit", code=64), "a second submission was taken without jobs.json")
    copy = Run(cluster, os.path.join(scratch, "copy"))
    os.makedirs(os.path.join(copy.folder, "slurm"))
    shutil.copy(jobs + "x", os.path.join(copy.folder, "slurm", "jobs.json"))
    os.rename(jobs + "x", jobs)
    output = copy.script("cancel")
    check("no job of" in output and "left alone" in output, "cancel of a copied folder:\n" + output)
    check("would end from" in run.script("cancel", "--dry-run"), "no jobs to cancel")
    run.wait()
    run.check_finished()
    check_equal(arguments, arguments.reference, run.folder)
    for stage in STAGES[:4]:
        for node in ("n1", "n2"):
            check(glob.glob(os.path.join(run.folder, "logs", stage + "-0", node + "-*.log")), "no log of {} on {}\n{}".format(stage, node, run.logs(stage)[-3000:]))
    with open(os.path.join(run.folder, "events.jsonl")) as file:
        events = [json.loads(line) for line in file]
    ends = {event["stage"] for event in events if event["event"] == "end"}
    check({"calibrate-0", "convert-0", "convert-1", "finetune-0", "evaluate-0", "evaluate-1", "evaluate-2", "report-0"} <= ends, "end events of {}".format(ends))
    check("everything is finished" in run.submit(), "what is finished was submitted again")
    check(run.script("status").count("finished") == 8, run.script("status"))
    cluster.check_nothing_left(run)


def test_stop(arguments, cluster, scratch):
    # A step may fail to start where the last one has hardly gone: nobody waits the two minutes here.
    run = Run(cluster, os.path.join(scratch, "run"), retries=3)
    run.submit()
    limit = 40  # on a machine that does other work as well

    def interrupt(stage, what, action):
        """Until it met a computing stage: elements are short, and may end just before."""
        while run.wait_until_it_computes(stage):
            time.sleep(random.uniform(0, 0.2))
            task = run.slurm(stage)
            action(task["Name"])
            start = time.monotonic()
            wait_for("ranks end after {}".format(what), lambda: not run.ranks(stage), limit)
            took = time.monotonic() - start
            wait_for("{} is requeued, or had ended".format(task["Name"]), lambda: run.slurm(stage, task["Name"])["JobState"] in ("PENDING", "COMPLETED"), 60, 0.2)
            if int(run.slurm(stage, task["Name"])["Restarts"]) > int(task["Restarts"]):
                say("{} in {}: ranks ended after {:.1f} s".format(what, task["Name"], took))
                return
        raise Missed("{} was over before {}".format(stage, what))

    def usr1(name):
        # scancel goes on trying when the task of an array was stopped by its signal.
        cluster.call("timeout", "3", "scancel", "--signal=USR1", name, code=None)

    interrupt("calibrate", "USR1", usr1)
    # As an operator or a lost node would.
    interrupt("calibrate", "scontrol requeue", lambda name: cluster.call("scontrol", "requeue", name, code=None))
    interrupt("finetune", "USR1", usr1)
    # A job of the partition above takes both nodes.
    interrupt("finetune", "preemption", lambda name: cluster.call("srun", "--partition=urgent", "-N2", "-n2", "true"))
    log = run.logs("calibrate") + run.logs("finetune")
    check(log.count("sequences, whose sums are in") >= 1 and log.count("saved in") >= 1, "nothing was saved when it was stopped:\n" + log)
    interrupt("evaluate", "USR1", usr1)
    # One element waits in the queue now, others run or wait as well.
    run.script("cancel", "--stop")
    wait_for("jobs end after STOP", lambda: run.ended(), limit, 0.2)
    states = [(entry["stage"], entry["state"]) for entry in run.status()]
    check(("evaluate", "stopped") in states and ("report", "cancelled") in states, "after STOP: {}\n{}".format(states, run.logs("evaluate")[-3000:]))
    check("STOP" in run.script("submit", code=64), "submitted although STOP is there")
    os.remove(os.path.join(run.folder, "STOP"))
    run.submit()
    run.wait()
    run.check_finished()
    check_equal(arguments, arguments.reference, run.folder)
    cluster.check_nothing_left(run)


def test_limit(arguments, cluster, scratch):
    run = Run(cluster, os.path.join(scratch, "run"), timeout=600)

    def limited(seconds):
        """The time limit is a minute, and the signal comes so many seconds before it, or up to half a minute earlier."""
        with open(run.config) as file:
            text = file.read()
        with open(run.config, "w") as file:
            file.write(re.sub(r"time = .*\n(signal-seconds = .*\n)?", "time = 1\nsignal-seconds = {}\n".format(seconds), text, count=1))

    def freeze(stage):
        """Ranks that compute are stopped: a stage that lasts without costing processor time."""
        check(run.wait_until_it_computes(stage), "{} was over before it could be stopped".format(stage))
        ranks = run.ranks(stage)
        for rank in ranks:
            os.kill(rank, signal.SIGSTOP)
        check(len(ranks) == 2, "ranks of {}: {}".format(stage, ranks))
        return ranks

    # A stage that hangs (for less than --comm-timeout) does not react to signals: Slurm kills it at its limit, and cancels what follows.
    limited(1)
    cluster.environment["HEADFOLD_TEST_HANG"] = "1:all-reduce:3"
    run.submit()
    del cluster.environment["HEADFOLD_TEST_HANG"]
    check(run.wait_until_it_computes("calibrate"), "calibrate was over at once")
    start = time.monotonic()
    wait_for("Slurm ends the stage", lambda: not cluster.call("squeue", "--noheader").strip(), 240, 0.5)
    say("ended {:.0f} s after it had begun to compute".format(time.monotonic() - start))
    check(not run.ranks("calibrate"), "ranks live")
    check(run.slurm("calibrate")["JobState"] == "TIMEOUT", "the job ended as {}".format(run.slurm("calibrate")["JobState"]))
    states = {entry["stage"]: entry["state"] for entry in run.status()}
    check(states["calibrate"] == "failed" and states["report"] == "cancelled", "after the limit: {}".format(states))
    check(not run.is_finished("calibrate"), "the stage is taken for finished")
    cluster.check_nothing_left()
    # The same command goes on. Slurm's signal comes before the limit: saved, 75, requeued.
    limited(50)
    run.submit()
    ranks = freeze("calibrate")
    start = time.monotonic()
    # Slurm lets them go on for its signal.
    wait_for("ranks end before the limit", lambda: not set(run.ranks("calibrate")) & set(ranks), 59, 0.2)
    say("SIGUSR1 came {:.0f} s after the stage was stopped".format(time.monotonic() - start))
    run.wait()
    run.check_finished()
    log = run.logs("calibrate")
    check("stopped with everything saved; back into the queue (1 of at most 200)" in log, "not requeued:\n" + log[-5000:])
    check(int(run.slurm("calibrate")["Restarts"]) >= 1, "restarts of {}".format(run.slurm("calibrate")))
    check_equal(arguments, arguments.reference, run.folder)
    cluster.check_nothing_left(run)


def test_kill(arguments, cluster, scratch):
    kills = int(os.environ.get("HEADFOLD_SLURM_KILLS", "10" if LONG else "1"))
    # Kills are spread over how long an undisturbed stage takes, start included.
    lengths = {"calibrate": 2.5, "convert": 2.0, "finetune": 3.0, "evaluate": 2.0, "report": 0.7}
    due = dict.fromkeys(STAGES, kills)
    rounds = 0
    # A stage goes on where it was killed, and so may finish before the last of its kills: those are for another run.
    while any(due.values()):
        rounds += 1
        check(rounds <= 6, "after {} runs ranks are still to be killed: {}".format(rounds - 1, due))
        run = Run(cluster, os.path.join(scratch, "run{}".format(rounds)), retries=1000)
        run.submit()
        for stage in STAGES:
            before = due[stage]
            slowest = 0.0
            while due[stage] and run.wait_for_stage(stage):
                time.sleep(random.uniform(0, lengths[stage]))
                ranks = run.ranks(stage)
                if not ranks:
                    continue
                try:
                    os.kill(random.choice(sorted(ranks)), signal.SIGKILL)
                except ProcessLookupError:
                    continue
                start = time.monotonic()
                wait_for("the other ranks of {} end".format(stage), lambda: not set(run.ranks(stage)) & set(ranks), 30)
                slowest = max(slowest, time.monotonic() - start)
                due[stage] -= 1
            if before:
                say("run {}, {}: {} ranks killed, all ended {:.1f} s later at most".format(rounds, stage, before - due[stage], slowest))
        run.wait()
        run.check_finished()
        check_equal(arguments, arguments.reference, run.folder)
        cluster.check_nothing_left(run)


def test_node(arguments, cluster, scratch):
    run = Run(cluster, os.path.join(scratch, "run"), retries=10)
    run.submit()
    if not run.wait_for_stage("finetune"):
        raise Missed("finetune was over before its node was lost")
    cluster.call(cluster.testbed, "kill-node", "n2", "--folder", cluster.folder)
    say("slurmd of n2 is killed")
    wait_for("Slurm misses the node", lambda: "down" in cluster.call("sinfo", "--noheader", "--nodes=n2", "--format=%T"), 60, 0.5)
    say("the node is down")
    cluster.call(cluster.testbed, "start-node", "n2", "--folder", cluster.folder)
    run.wait()
    run.check_finished()
    check_equal(arguments, arguments.reference, run.folder)
    cluster.check_nothing_left(run)


def test_disk(arguments, cluster, scratch):
    mounted = os.path.join(scratch, "small")
    os.makedirs(mounted)
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8M", "tmpfs", mounted], stderr=subprocess.DEVNULL).returncode != 0:
        raise Skip("no tmpfs may be mounted here")
    try:
        run = Run(cluster, os.path.join(mounted, "run"))
        failures = []
        for size in ("8M", "50M", "800M"):
            execute(["mount", "-o", "remount,size=" + size, mounted])
            run.submit()
            run.wait()
            states = {}
            for entry in run.status():
                states.setdefault(entry["stage"], []).append(entry["state"])
            failed = [stage for stage in STAGES if "failed" in states[stage]]
            say("{}: {}".format(size, failed or "all finished"))
            if failed:
                log = run.logs(failed[0])
                check(re.search(r"space|free", log), "{} does not say why:\n{}".format(failed[0], log[-3000:]))
            failures += failed
        check(len(failures) >= 2, "the disk was full in {} only".format(failures))
        run.check_finished()
        check_equal(arguments, arguments.reference, run.folder)
        cluster.check_nothing_left(run)
    finally:
        execute(["umount", "--lazy", mounted], code=None)


def test_hang(arguments, cluster, scratch):
    timeout = 4
    for name, hook in (("HEADFOLD_TEST_HANG", "1:all-reduce:3"), ("HEADFOLD_TEST_FREEZE", "1:progress:2")):
        run = Run(cluster, os.path.join(scratch, name), timeout=timeout)
        cluster.environment[name] = hook
        run.submit("--only", "calibrate")
        del cluster.environment[name]
        run.wait_for_stage("calibrate")
        start = time.monotonic()
        wait_for("the job ends although rank 1 hangs", lambda: not run.ranks("calibrate"), timeout + 10 + 5)
        took = time.monotonic() - start
        run.wait()
        log = run.logs("calibrate")
        say("{}: ended {:.1f} s after the ranks had started".format(name, took))
        check(int(run.slurm("calibrate")["ExitCode"].split(":")[0]) != 0, "the job did not fail")
        check(re.search(r"rank 1\b.*\bn2\b", log), "rank 1 on n2 is not named:\n" + log[-5000:])
        check(run.status()[0]["state"] == "failed", "status: {}".format(run.status()[0]))
        check(not run.is_finished("calibrate"), "the stage is taken for finished")
        cluster.check_nothing_left()


CASES = {"chain": test_chain, "stop": test_stop, "limit": test_limit, "kill": test_kill, "node": test_node, "disk": test_disk, "hang": test_hang}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("case", choices=["reference", "scripts"] + sorted(CASES))
    parser.add_argument("--headfold", required=True, type=os.path.abspath)
    parser.add_argument("--reference", required=True, type=os.path.abspath)
    parser.add_argument("--source", default=os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))
    parser.add_argument("--mpirun", default="mpirun")
    parser.add_argument("--keep", action="store_true")
    arguments = parser.parse_args()
    seed = int(os.environ.get("HEADFOLD_SLURM_SEED", str(random.randrange(10**6))))
    random.seed(seed)
    say("{}; HEADFOLD_SLURM_SEED={}".format(arguments.case, seed))
    if arguments.case == "reference":
        make_reference(arguments)
        return 0
    if arguments.case == "limit" and not LONG:
        print("skipped: three minutes of waiting; HEADFOLD_LONG_TESTS=1, or launch/test --thorough")
        return 77
    attempts = 3
    for attempt in range(1, attempts + 1):
        scratch = tempfile.mkdtemp(prefix="hf-slurm-", dir="/tmp")
        cluster = None
        try:
            if arguments.case == "scripts":
                test_scripts(arguments, scratch)
            else:
                cluster = Cluster(arguments, scratch)
                CASES[arguments.case](arguments, cluster, scratch)
            say("passed")
            return 0
        except Missed as missed:
            say("attempt {} of {}: {}".format(attempt, attempts, missed))
        except Skip as skip:
            print("skipped: {}".format(skip))
            return 77
        finally:
            if cluster:
                cluster.stop()
            if not arguments.keep:
                shutil.rmtree(scratch, ignore_errors=True)
    print("skipped: stages were over too soon to be interrupted")
    return 77


try:
    sys.exit(main())
except AssertionError as failure:
    print("FAILED: {}".format(failure))
    sys.exit(1)
