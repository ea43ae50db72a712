"""A stand-in for sacct: answers from slurmctld's memory what the real one reads from slurmdbd's database.

The real sacct needs slurmdbd and a MariaDB server, which would cost more time and disk than the rest of the testbed
together. What programs ask of it (``sacct -o JobID,State,NodeList --parsable2 -j JOB``, say) slurmctld knows too, for
`MinJobAge` seconds after a job's end. Jobs only, no steps; columns of the table below only.

A script of its own with the standard library alone: it runs on the hosts, outside the package.
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
    """Print one line a job; return the exit status."""
    options = _parser().parse_args(arguments)
    names = [name.partition("%")[0].lower() for name in options.format.split(",")]
    if unknown := [name for name in names if name not in _FIELDS]:
        print(f"sacct (stand-in of the testbed): no column {', '.join(unknown)}", file=sys.stderr)  # noqa: T201
        return 1
    wanted = {job for group in options.jobs for job in group.split(",")}
    rows = [[_value(job, name) for name in names] for job in _jobs() if not wanted or _is_wanted(job, wanted)]
    heads = [] if options.noheader else [[_FIELDS[name][0] for name in names]]
    for row in heads + rows:
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
    parser.add_argument("-X", "--allocations", action="store_true", help="always so")
    return parser


def _jobs() -> list[dict[str, str]]:
    shown = subprocess.run(
        ["scontrol", "--all", "--oneliner", "show", "job"], capture_output=True, text=True, check=True
    )
    return [_fields(line) for line in shown.stdout.splitlines() if line.startswith("JobId=")]


def _fields(line: str) -> dict[str, str]:
    """Return the ``Key=value`` words of a line; a value with spaces (a name, a path) is cut at the first."""
    return dict(word.split("=", 1) for word in line.split() if "=" in word)


def _value(job: dict[str, str], name: str) -> str:
    if name == "jobid":
        return _shown_id(job)
    value = job.get(_FIELDS[name][1], "")
    return "None assigned" if name == "nodelist" and value in {"", "(null)"} else value


def _shown_id(job: dict[str, str]) -> str:
    if "ArrayJobId" not in job:
        return job["JobId"]
    task = job.get("ArrayTaskId", "")
    # Tasks of an array that do not run yet are one record: "4-7".
    return f"{job['ArrayJobId']}_{task if task.isdigit() else f'[{task}]'}"


def _is_wanted(job: dict[str, str], wanted: set[str]) -> bool:
    return bool(wanted & {job["JobId"], job.get("ArrayJobId", ""), _shown_id(job)})


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
