"""The run report and the progress display: how many bytes moved, from where, and how long it took."""
