"""Public test helpers: a Hub-compatible server, a fake origin, ranks on one machine."""
