"""Differential privacy: noise, what it costs, and the ledger at a site that says when to stop."""
