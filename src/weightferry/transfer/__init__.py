"""Transfer missing bytes into the cache: ranged reads from the origins, the relay between leaders, hashing."""
