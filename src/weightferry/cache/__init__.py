"""The node-local cache: every path in it, its lock, and how a file gets its final name."""
