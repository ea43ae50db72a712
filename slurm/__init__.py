"""Launchers and sbatch scripts for real clusters, and a real cluster on one machine to try them on."""
