"""What happened, in numbers: the run report."""
