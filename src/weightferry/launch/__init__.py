"""Run a function or a command on N nodes x M tasks, with ranks, a process group, staged sources and requeue."""

from weightferry.launch.submit import submit, submit_command

__all__ = ["submit", "submit_command"]
