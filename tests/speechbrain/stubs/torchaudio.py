"""Stands for torchaudio, which does not exist for every torch; SpeechBrain asks it only which backends it has."""

__version__ = "2.13.0"


def list_audio_backends() -> list[str]:
    """Return a backend that SpeechBrain knows, so that it logs no warning."""
    return ["soundfile"]
