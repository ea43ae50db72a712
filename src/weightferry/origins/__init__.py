"""Origins, the places that weights are read from: the `Origin` protocol, and one module for each kind."""
