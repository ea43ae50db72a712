"""The cache folder of a node: its paths, locks, partial data, checks and eviction, and the rename that publishes."""
