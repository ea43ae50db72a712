"""Recipes of the real SpeechBrain: `make test-speechbrain` installs it and runs these tests."""
