"""Runs: checkpoint files and their one schema, whom files may name, stop signals, provenance."""
