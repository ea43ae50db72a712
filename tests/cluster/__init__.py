"""Tests on a real Slurm cluster that the tests start themselves; they need root."""
