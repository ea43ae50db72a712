"""``python -m weightferry.cli``."""

from weightferry.cli import main

main()
