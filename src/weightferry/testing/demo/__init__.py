"""``weightferry demo``: stages and loads a real model on two nodes with two ranks each, on this machine."""

from weightferry.testing.demo.run import DemoError, RankFinding, model_folder, run

__all__ = ["DemoError", "RankFinding", "model_folder", "run"]
