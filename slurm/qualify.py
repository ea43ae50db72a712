"""Run ``weightferry doctor``: check whether this cluster is fit for weightferry.

Kept for scripts that call it by this name::

    python slurm/qualify.py --nodes 4 --partition gpu --cache-dir /local/$USER/weightferry --shared /scratch/$USER
"""

from __future__ import annotations

from weightferry.cli.doctor import doctor

if __name__ == "__main__":
    doctor(prog_name="qualify.py")
