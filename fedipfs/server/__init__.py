"""What the coordinator runs: rounds, records, resume, engines."""
