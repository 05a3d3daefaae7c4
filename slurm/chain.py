"""What slurm/submit, slurm/status and slurm/cancel share: the stages of a pipeline, the site's settings, the jobs of a run folder.

Python 3.6 and its standard library, as it stands on any login node.
"""

import argparse
import contextlib
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

FOLDER = os.path.dirname(os.path.abspath(__file__))
REPOSITORY = os.path.dirname(FOLDER)

# States of jobs that wait or run; every other one is an end.
WAITING = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "SUSPENDED", "CONFIGURING")
RUNNING = ("RUNNING", "COMPLETING", "STAGE_OUT", "SIGNALING", "STOPPED")


class Failure(Exception):
    """Ends the program with a message and an exit code (64 usage, 65 bad input, 74 input/output)."""

    def __init__(self, message, code=64):
        super().__init__(message)
        self.code = code


class Interrupted(Failure):
    """SIGINT, SIGTERM or SIGHUP."""

    def __init__(self, number):
        super().__init__("interrupted by {}".format(signal.Signals(number).name), 75)


class NoAnswer(Failure):
    """A program of Slurm got no answer from its daemons."""

    def __init__(self, message):
        super().__init__(message, 74)


SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@contextlib.contextmanager
def undisturbed():
    """Signals that come meanwhile, here or to commands that are run, count afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def hold_signals():
    """Nothing is interrupted from here to the end."""
    signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)


class Parser(argparse.ArgumentParser):
    """A command line whose help is the program's own text; errors are Failures."""

    def __init__(self, text):
        super().__init__(add_help=False)
        self.text = text
        self.add_argument("--help", "-h", action="store_true")

    def error(self, message):
        raise Failure(message + " (see --help)")

    def parse(self):
        if "--help" in sys.argv[1:] or "-h" in sys.argv[1:]:
            print(self.text.strip())
            sys.exit(0)
        return self.parse_args()


def main(program, run):
    """Runs `run()`; a Failure becomes one line."""
    def interrupt(number, _):
        raise Interrupted(number)
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, interrupt)
    try:
        code = run() or 0
        sys.stdout.flush()
    except Failure as failure:
        note(program, failure)
        code = failure.code
    except OSError as error:
        # Nobody reads any more, or there is no room: without this, Python would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
        if error.errno != errno.EPIPE:
            note(program, "{}: {}".format(error.filename or "cannot write the output", error.strerror))
            code = 74
    sys.exit(code)


def execute(command, environment=None, seconds=None):
    """Exit code, output and error output of a command; NoAnswer after `seconds`."""
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True, timeout=seconds)
    except subprocess.TimeoutExpired as expired:
        said = expired.stderr or ""
        said = said.decode(errors="replace") if isinstance(said, bytes) else said
        raise NoAnswer("{} did not end within {:g} seconds{}".format(command[0], seconds, ":\n" + said.strip() if said.strip() else ""))
    except OSError as error:
        raise Failure("cannot run {}: {}".format(command[0], error.strerror), 74)
    return done.returncode, done.stdout, done.stderr


def note(program, message):
    print("{}: {}".format(program, message), file=sys.stderr)


@contextlib.contextmanager
def locked(folder, program):
    """One `program` at a time for a run's folder; Failure (75) where another one is at work."""
    path = os.path.join(folder, "slurm", ".submit-lock")
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        file = open(path, "a")
    except OSError as error:
        raise Failure("cannot write into {}: {}".format(folder, error.strerror), 74)
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EAGAIN, errno.EACCES):
                raise Failure("another {} is at work for {}; nothing was done".format(program, folder), 75)
            note(program, "no lock on {} ({}): see that only one {} is at work".format(path, error.strerror, program))
        yield


# ------------------------------------------------------------------------------------------------------------------
# Settings and stages
# ------------------------------------------------------------------------------------------------------------------

def read_site(path):
    """Path of the site's settings (None without any) and the environment after they were sourced."""
    if path is None:
        path = os.environ.get("HEADFOLD_SITE") or os.path.join(FOLDER, "site.env")
        if not os.path.exists(path) and not os.environ.get("HEADFOLD_SITE"):
            return None, dict(os.environ)
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise Failure("no settings of the site at {}".format(path), 65)
    if not os.access(path, os.R_OK):
        raise Failure("cannot read {}".format(path), 65)
    code, _, errors = execute(["bash", "-n", path])
    if code != 0:
        raise Failure("{} is not what bash reads:\n{}".format(path, errors.strip()), 65)
    # As batch.sh does it: modules and the like are not written for failing commands, so their exit codes do not count.
    code, output, errors = execute(["bash", "-c", 'set -a; source "$1" >&2; env -0', "site", path])
    if code != 0 or not output:
        raise Failure("{} ends the shell that sources it, with exit code {}{}".format(path, code, ":\n" + errors.strip() if errors.strip() else ""), 65)
    return path, dict(entry.split("=", 1) for entry in output.split("\0") if "=" in entry)


def program(environment):
    """The command that starts headfold on this machine, as a list."""
    container = environment.get("HEADFOLD_CONTAINER") or "none"
    if container not in ("none", "apptainer", "pyxis"):
        raise Failure("HEADFOLD_CONTAINER is none, apptainer or pyxis, not '{}'".format(container), 65)
    if container != "none" and not environment.get("HEADFOLD_IMAGE"):
        raise Failure("HEADFOLD_CONTAINER is {}, but there is no HEADFOLD_IMAGE".format(container), 65)
    headfold = environment.get("HEADFOLD")
    if not headfold and container != "apptainer":
        built = os.path.join(REPOSITORY, "build", "release", "jobs", "headfold")
        headfold = built if os.access(built, os.X_OK) else shutil.which("headfold", path=environment.get("PATH"))
    if environment.get("HEADFOLD_ON_LOGIN"):
        return environment["HEADFOLD_ON_LOGIN"].split()
    if container == "apptainer":
        return ([environment.get("HEADFOLD_APPTAINER", "apptainer"), "exec", "--bind", environment.get("HEADFOLD_MOUNTS", os.getcwd()),
                 environment.get("HEADFOLD_IMAGE", "")] + [headfold or "headfold"])
    if not headfold:
        raise Failure("headfold is not there: set HEADFOLD in slurm/site.env, or build it (launch/build)")
    return [headfold]


def read_stages(command, environment, config, checked=False):
    """The pipeline as `headfold run --list --json` tells it; checked: refused where a stage would refuse its values, model or files."""
    if not os.path.isfile(config):
        raise Failure("no pipeline at {}".format(config), 65)
    code, output, errors = execute(command + ["run", "--config", config, "--list", "--json"] + ([] if checked else ["--unchecked"]), environment)
    if code != 0:
        raise Failure("{} run --config {} --list --json failed with {}:\n{}".format(
            command[0], config, code, errors.strip() or output.strip()), code if code in (64, 65, 74) else 65)
    try:
        pipeline = json.loads(output)
        names = [stage["stage"] for stage in pipeline["stages"]]
        for stage in pipeline["stages"]:
            stage["after"] = [name for name in stage.get("after", []) if name in names]
            stage["resources"] = {key: str(value) for key, value in stage.get("resources", {}).items()}
            for element in stage["elements"]:
                element["finished"] = bool(element.get("finished"))
                element["name"]
        pipeline["folder"] = os.path.join(os.path.dirname(config), pipeline["folder"])
    except (ValueError, KeyError, TypeError) as error:
        raise Failure("{} run --list --json printed something else than stages ({})".format(command[0], error), 65)
    return pipeline


# ------------------------------------------------------------------------------------------------------------------
# folder/slurm/jobs.json
# ------------------------------------------------------------------------------------------------------------------

def jobs_path(folder):
    return os.path.join(folder, "slurm", "jobs.json")


def read_jobs(folder):
    """All submissions, oldest first: [{"time":, "folder":, "cluster":, "jobs": [{"stage":, "id":, "elements": [..] or None}]}]. A copied or moved
    run folder brings along those of the original, which `folder` tells; in files of older versions it is missing."""
    path = jobs_path(folder)
    try:
        with open(path) as file:
            submissions = json.load(file)["submissions"]
        for submission in submissions:
            str(submission.get("folder")), str(submission.get("cluster"))
            for job in submission["jobs"]:
                job["stage"], int(job["id"]), job["elements"]
        return submissions
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise Failure("cannot read {}: {}".format(path, error), 65)


def write_file(path, text, mode=0o644):
    """Writes through a temporary file."""
    temporary = path + ".tmp"
    try:
        with open(temporary, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, mode)
        os.rename(temporary, path)
    except OSError as error:
        try:
            os.remove(temporary)
        except OSError:
            pass
        raise Failure("cannot write {}: {}".format(path, error.strerror), 74)


def write_jobs(folder, submissions):
    write_file(jobs_path(folder), json.dumps({"format": "headfold-jobs", "version": 1, "submissions": submissions}, indent=1) + "\n")


def submitted_for(submission, folder):
    return not submission.get("folder") or os.path.realpath(submission["folder"]) == os.path.realpath(folder)


def latest_jobs(submissions, folder, cluster=None):
    """The last job of every (stage, element), as {(stage, element): (id, is it an array?)}; element is 0 where the job is no array. Without jobs of other
    folders, and of other clusters where `cluster` is known."""
    jobs = {}
    for submission in submissions:
        if not submitted_for(submission, folder) or (cluster and submission.get("cluster") not in (None, cluster)):
            continue
        for job in submission["jobs"]:
            for element in job["elements"] or [0]:
                jobs[(job["stage"], element)] = (job["id"], job["elements"] is not None)
    return jobs


# ------------------------------------------------------------------------------------------------------------------
# Slurm's view
# ------------------------------------------------------------------------------------------------------------------

def slurm_is_there(environment):
    return shutil.which("squeue", path=environment.get("PATH")) is not None


# Slurm's NO_VAL: in the place of a number, there is none.
NO_NUMBER = 2**32 - 2


def array_members(text):
    """Members of an array in Slurm's notation: "3", "0-2,5%2" or "[0-2,5%2]"; none for NO_NUMBER, which stands for whatever has no line of its own."""
    members = []
    if text == str(NO_NUMBER):
        return members
    for part in text.strip("[]").split("%")[0].split(","):
        match = re.match(r"^(\d+)(?:-(\d+)(?::(\d+))?)?$", part)
        if match:
            first, last, step = int(match.group(1)), int(match.group(2) or match.group(1)), int(match.group(3) or 1)
            members.extend(range(first, last + 1, step))
    return members


def ask(command, environment):
    """What a program of Slurm prints, with exit code 0 or an `Invalid job id` (then nothing). NoAnswer when the daemons do not answer: the programs try for
    up to a minute then, each time."""
    # Long lists of an array's members are cut off at 64 characters otherwise.
    code, output, errors = execute(command, dict(environment, SLURM_BITSTR_LEN="0"), answer_seconds(environment))
    if code != 0 and "Invalid job id" not in errors:
        raise NoAnswer("Slurm does not answer: {} ended with {}{}".format(" ".join(command), code, ":\n" + errors.strip() if errors.strip() else ""))
    return output if code == 0 else ""


def answer_seconds(environment):
    """How long an answer of Slurm is waited for."""
    value = environment.get("HEADFOLD_SLURM_TIMEOUT") or "30"
    if not value.isdigit() or int(value) == 0:
        raise Failure("HEADFOLD_SLURM_TIMEOUT is a number of seconds, not '{}'".format(value), 65)
    return int(value)


def cluster_name(environment):
    match = re.search(r"^ClusterName\s*=\s*(\S+)", ask(["scontrol", "show", "config"], environment), flags=re.M)
    return match.group(1) if match else None


def stage_of_script(path, folder):
    """The stage whose batch script in this run's folder `path` is, else None: the mark of a job that was submitted for this very folder."""
    directory, name = os.path.split(path)
    if not name.endswith(".sbatch") or os.path.realpath(directory) != os.path.realpath(os.path.join(folder, "slurm")):
        return None
    return name[:-len(".sbatch")]


def living_jobs(folder, environment):
    """{job id: stage} of the user's jobs that wait or run with a batch script of this folder, in jobs.json or not (its writer may have been killed)."""
    user = str(os.getuid())
    found = {}
    for line in ask(["squeue", "--noheader", "--user=" + user, "--format=%F|%o"], environment).splitlines():
        job, _, script = line.strip().partition("|")
        stage = stage_of_script(script, folder)
        if stage and job.isdigit():
            found[job] = stage
    return found


def query_states(jobs, folder, environment):
    """{(job id, array member or 0): {"state":, "reason":, "restarts":, "code":, "start":}} of those of `jobs` (as of latest_jobs) that Slurm still knows and
    that are this folder's: an id may be another job's, in a copied folder or on another cluster."""
    states = {}
    stages = {str(job): stage for (stage, _), (job, _) in jobs.items()}
    submitted = {}
    for (_, element), (job, is_array) in jobs.items():
        submitted.setdefault(str(job), []).append(element if is_array else 0)

    def record(found, job):
        """Takes over [(members, state)] of a job, or ([], state) for all of its others: what Slurm has not split up yet, or will never, stands for several
        members, and may stand before or behind those that have a line of their own."""
        for members, state in sorted(found, key=lambda one: -len(one[0]) if one[0] else float("-inf")):
            for member in members or submitted[job]:
                states[(job, member)] = state

    if not stages or not slurm_is_there(environment):
        return states
    missing = []
    for job in sorted(stages, key=int):
        known, found = False, []
        for line in ask(["scontrol", "show", "job", "--oneliner", job], environment).splitlines():
            fields = dict(field.split("=", 1) for field in line.split(" ") if "=" in field)
            if "JobState" not in fields:
                continue
            known = True
            script = re.search(r" Command=(.*?) WorkDir=", line)
            if not script or stage_of_script(script.group(1), folder) != stages[job]:
                continue
            found.append((array_members(fields["ArrayTaskId"]) if "ArrayTaskId" in fields else [0], {
                "state": fields["JobState"], "reason": fields.get("Reason", ""), "restarts": int(fields.get("Restarts", 0)),
                "code": fields.get("ExitCode", ""), "start": fields.get("StartTime", ""), "nodes": fields.get("NodeList", "")}))
        record(found, job)
        if not known:
            missing.append(job)
    if missing and shutil.which("sacct", path=environment.get("PATH")):
        # What slurmctld has forgotten has ended; how, only the accounting knows, where there is one.
        try:
            code, output, _ = execute(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode,JobName",
                                       "--jobs=" + ",".join(missing)], environment, answer_seconds(environment))
        except NoAnswer:
            code, output = 1, ""
        found = {}
        for line in output.splitlines() if code == 0 else []:
            match = re.match(r"^(\d+)(?:_(\d+|\[[^]|]*\]))?\|([A-Z_]+)[^|]*\|([^|]*)\|(.*)$", line)
            if match and match.group(5) == job_name(folder, stages.get(match.group(1))):
                found.setdefault(match.group(1), []).append((array_members(match.group(2) or "0"), {
                    "state": match.group(3), "reason": "", "restarts": 0, "code": match.group(4), "start": "", "nodes": ""}))
        for job in found:
            record(found[job], job)
    return states


def job_name(folder, stage):
    return "{}-{}".format(os.path.basename(folder.rstrip("/")) or "headfold", stage)


def is_alive(state):
    return state["state"] in WAITING or state["state"] in RUNNING


# ------------------------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------------------------

def table(header, rows):
    widths = [max(len(str(row[i])) for row in [header] + rows) for i in range(len(header))]
    return "\n".join("  ".join(str(cell).ljust(width) for cell, width in zip(row, widths)).rstrip() for row in [header] + rows)


def duration(seconds):
    seconds = int(seconds + 0.5)
    if seconds < 100:
        return "{} s".format(seconds)
    if seconds < 6000:
        return "{} min".format((seconds + 30) // 60)
    return "{} h {:02} min".format(seconds // 3600, seconds % 3600 // 60)


def now():
    return time.strftime("%Y-%m-%dT%H:%M:%S")
