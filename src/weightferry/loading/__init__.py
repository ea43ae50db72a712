"""From a whole file on disk into the user's objects."""
