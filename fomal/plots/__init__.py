"""Figures: one per file; they read results and never train."""
