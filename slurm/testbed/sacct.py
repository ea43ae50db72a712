"""A replacement for sacct: it reads jobs from slurmctld instead of slurmdbd's database.

The real sacct needs slurmdbd and a MariaDB server, which cost more time and disk space than the whole rest of the
testbed. slurmctld knows the fields that programs request (``sacct -o JobID,State,NodeList --parsable2 -j JOB``), for
`MinJobAge` seconds after a job's end. This script lists jobs, not steps, and only the columns of the table below.

It is a separate script that imports only the standard library: it runs on the hosts, outside the package.
"""

from __future__ import annotations

import argparse
import subprocess
import sys

_FIELDS = {
    "jobid": ("JobID", "JobId"),
    "jobname": ("JobName", "JobName"),
    "partition": ("Partition", "Partition"),
    "state": ("State", "JobState"),
    "exitcode": ("ExitCode", "ExitCode"),
    "nodelist": ("NodeList", "NodeList"),
    "nnodes": ("NNodes", "NumNodes"),
    "ntasks": ("NTasks", "NumTasks"),
    "submit": ("Submit", "SubmitTime"),
    "start": ("Start", "StartTime"),
    "end": ("End", "EndTime"),
    "elapsed": ("Elapsed", "RunTime"),
    "restarts": ("Restarts", "Restarts"),
}
_DEFAULT = "JobID,JobName,Partition,State,ExitCode"


def main(arguments: list[str]) -> int:
    """Print one line for each job; return the exit status."""
    options = _parser().parse_args(arguments)
    names = [name.partition("%")[0].lower() for name in options.format.split(",")]
    if unknown := [name for name in names if name not in _FIELDS]:
        print(f"sacct (replacement in the testbed): unknown column {', '.join(unknown)}", file=sys.stderr)  # noqa: T201
        return 1
    requested = {job for group in options.jobs for job in group.split(",")}
    rows = [[_value(job, name) for name in names] for job in _jobs() if not requested or _is_requested(job, requested)]
    header = [] if options.noheader else [[_FIELDS[name][0] for name in names]]
    for row in header + rows:
        line = "|".join(row) + ("|" if options.parsable else "")
        print(line if options.parsable or options.parsable2 else "  ".join(f"{cell:>12}" for cell in row))  # noqa: T201
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sacct", allow_abbrev=False)
    parser.add_argument("-o", "--format", default=_DEFAULT)
    parser.add_argument("-j", "--jobs", action="append", default=[])
    parser.add_argument("-P", "--parsable2", action="store_true")
    parser.add_argument("-p", "--parsable", action="store_true")
    parser.add_argument("-n", "--noheader", action="store_true")
    parser.add_argument("-X", "--allocations", action="store_true", help="always on")
    return parser


def _jobs() -> list[dict[str, str]]:
    listing = subprocess.run(
        ["scontrol", "--all", "--oneliner", "show", "job"], capture_output=True, text=True, check=True
    )
    return [_fields(line) for line in listing.stdout.splitlines() if line.startswith("JobId=")]


def _fields(line: str) -> dict[str, str]:
    """Return the ``Key=value`` words of a line; a value with spaces (a name, a path) ends at the first space."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _value(job: dict[str, str], name: str) -> str:
    if name == "jobid":
        return _display_id(job)
    value = job.get(_FIELDS[name][1], "")
    return "None assigned" if name == "nodelist" and value in {"", "(null)"} else value


def _display_id(job: dict[str, str]) -> str:
    if "ArrayJobId" not in job:
        return job["JobId"]
    task = job.get("ArrayTaskId", "")
    # Tasks of an array that wait in the queue are one record: "4-7".
    return f"{job['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"


def _is_requested(job: dict[str, str], requested: set[str]) -> bool:
    return bool(requested & {job["JobId"], job.get("ArrayJobId", ""), _display_id(job)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
