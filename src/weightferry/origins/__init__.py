"""Where bytes come from: one small protocol, and one module per kind of origin."""
