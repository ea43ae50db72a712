"""Tests on a real Slurm cluster that they bring up themselves; root is needed."""
