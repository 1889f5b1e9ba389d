"""Rivals of slm, one readable file each."""
