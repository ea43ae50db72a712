"""Load a complete local file into the user's objects."""
