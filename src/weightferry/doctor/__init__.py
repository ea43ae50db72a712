"""Checks whether a cluster is fit for weightferry: measures its nodes in one job and draws a conclusion."""
