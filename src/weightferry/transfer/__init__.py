"""Getting missing bytes into the cache: the plan (pure) and the reading."""
