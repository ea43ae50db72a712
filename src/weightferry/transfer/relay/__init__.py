"""The ring of leaders: frames travel from each leader to its right neighbour."""
