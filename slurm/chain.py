"""What slurm/submit, slurm/status and slurm/cancel share: the stages of a pipeline, the site's settings, the jobs of a run folder.

Python 3.6 and its standard library, as it stands on any login node.
"""

import argparse
import json
import os
import re
import shutil
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
    try:
        sys.exit(run() or 0)
    except Failure as failure:
        print("{}: {}".format(program, failure), file=sys.stderr)
        sys.exit(failure.code)
    except BrokenPipeError:
        sys.exit(0)


def execute(command, environment=None):
    """Exit code, output and error output of a command."""
    try:
        done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                              universal_newlines=True)
    except OSError as error:
        raise Failure("cannot run {}: {}".format(command[0], error.strerror), 74)
    return done.returncode, done.stdout, done.stderr


# ------------------------------------------------------------------------------------------------------------------
# Settings and stages
# ------------------------------------------------------------------------------------------------------------------

def read_site(path):
    """Path of the site's settings (None without any) and the environment after they were sourced."""
    if path is None:
        path = os.environ.get("HEADFOLD_SITE") or os.path.join(FOLDER, "site.env")
        if not os.path.exists(path) and "HEADFOLD_SITE" not in os.environ:
            return None, dict(os.environ)
    path = os.path.abspath(path)
    if not os.path.isfile(path):
        raise Failure("no settings of the site at {}".format(path), 65)
    code, output, errors = execute(["bash", "-c", 'set -a; source "$1" >&2 && env -0', "site", path])
    if code != 0:
        raise Failure("{} cannot be sourced by bash:\n{}".format(path, errors.strip()), 65)
    return path, dict(entry.split("=", 1) for entry in output.split("\0") if "=" in entry)


def program(environment):
    """The command that starts headfold on this machine, as a list."""
    headfold = environment.get("HEADFOLD")
    if not headfold:
        built = os.path.join(REPOSITORY, "build", "release", "jobs", "headfold")
        headfold = built if os.access(built, os.X_OK) else shutil.which("headfold", path=environment.get("PATH"))
    if environment.get("HEADFOLD_ON_LOGIN"):
        return environment["HEADFOLD_ON_LOGIN"].split()
    if environment.get("HEADFOLD_CONTAINER") == "apptainer":
        return ([environment.get("HEADFOLD_APPTAINER", "apptainer"), "exec", "--bind", environment.get("HEADFOLD_MOUNTS", os.getcwd()),
                 environment.get("HEADFOLD_IMAGE", "")] + [headfold or "headfold"])
    if not headfold:
        raise Failure("headfold is not there: set HEADFOLD in slurm/site.env, or build it (launch/build)")
    return [headfold]


def read_stages(command, environment, config):
    """The pipeline as `headfold run --list --json` tells it."""
    if not os.path.isfile(config):
        raise Failure("no pipeline at {}".format(config), 65)
    code, output, errors = execute(command + ["run", "--config", config, "--list", "--json"], environment)
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
    """All submissions of a run, oldest first: [{"time":, "jobs": [{"stage":, "id":, "elements": [..] or None}]}]."""
    path = jobs_path(folder)
    try:
        with open(path) as file:
            submissions = json.load(file)["submissions"]
        for submission in submissions:
            for job in submission["jobs"]:
                job["stage"], int(job["id"]), job["elements"]
        return submissions
    except FileNotFoundError:
        return []
    except (OSError, ValueError, KeyError, TypeError) as error:
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
        raise Failure("cannot write {}: {}".format(path, error.strerror), 74)


def write_jobs(folder, submissions):
    write_file(jobs_path(folder), json.dumps({"format": "headfold-jobs", "version": 1, "submissions": submissions}, indent=1) + "\n")


def latest_jobs(submissions):
    """The last job of every (stage, element), as {(stage, element): id}; element is 0 where the job is no array."""
    jobs = {}
    for submission in submissions:
        for job in submission["jobs"]:
            for element in job["elements"] or [0]:
                jobs[(job["stage"], element)] = (job["id"], job["elements"] is not None)
    return jobs


# ------------------------------------------------------------------------------------------------------------------
# Slurm's view
# ------------------------------------------------------------------------------------------------------------------

def slurm_is_there(environment):
    return shutil.which("squeue", path=environment.get("PATH")) is not None


def array_members(text):
    """Members of an array in squeue's notation: "3", "0-2,5%2" or "[0-2,5%2]"."""
    members = []
    for part in text.strip("[]").split("%")[0].split(","):
        match = re.match(r"^(\d+)(?:-(\d+)(?::(\d+))?)?$", part)
        if match:
            first, last, step = int(match.group(1)), int(match.group(2) or match.group(1)), int(match.group(3) or 1)
            members.extend(range(first, last + 1, step))
    return members


def query_states(ids, environment):
    """{(job id, array member or 0): {"state":, "reason":, "restarts":, "code":, "start":}} for jobs that Slurm still knows."""
    states = {}
    if not ids or not slurm_is_there(environment):
        return states
    for job in sorted(set(ids), key=int):
        code, output, _ = execute(["scontrol", "show", "job", "--oneliner", str(job)], environment)
        if code != 0:
            continue
        for line in output.splitlines():
            fields = dict(field.split("=", 1) for field in line.split(" ") if "=" in field)
            if "JobState" not in fields:
                continue
            members = array_members(fields["ArrayTaskId"]) if "ArrayTaskId" in fields else [0]
            for member in members:
                states[(str(job), member)] = {
                    "state": fields["JobState"], "reason": fields.get("Reason", ""), "restarts": int(fields.get("Restarts", 0)),
                    "code": fields.get("ExitCode", ""), "start": fields.get("StartTime", ""), "nodes": fields.get("NodeList", "")}
    missing = [job for job in set(ids) if not any(key[0] == str(job) for key in states)]
    if missing and shutil.which("sacct", path=environment.get("PATH")):
        code, output, _ = execute(["sacct", "--noheader", "--parsable2", "--allocations", "--format=JobID,State,ExitCode",
                                   "--jobs=" + ",".join(str(job) for job in missing)], environment)
        for line in output.splitlines() if code == 0 else []:
            match = re.match(r"^(\d+)(?:_(\d+))?\|([A-Z_]+)[^|]*\|([^|]*)$", line)
            if match:
                states[(match.group(1), int(match.group(2) or 0))] = {"state": match.group(3), "reason": "", "restarts": 0,
                                                                      "code": match.group(4), "start": "", "nodes": ""}
    return states


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
