"""What a person sees of a run: live progress, the closing summary, the report, past runs."""
