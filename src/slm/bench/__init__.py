"""Bench: rivals and reports, through the public API only."""
