"""Scripts for real Slurm clusters, and a real Slurm cluster on one machine for tests."""
