"""With the real SpeechBrain: `make test-speechbrain` installs it and runs these tests."""

from __future__ import annotations

from importlib.util import find_spec

from tests.conftest import need

need(find_spec("speechbrain"), "SpeechBrain is not installed here: run `make test-speechbrain`")
