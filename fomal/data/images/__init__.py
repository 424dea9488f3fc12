"""Image files: found, checked, decoded once, grouped by class."""
