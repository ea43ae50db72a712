"""``python -m weightferry``: the command ``weightferry``."""

from weightferry.cli import main

main()
