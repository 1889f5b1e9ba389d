"""Increments: low-rank pairs and the pool that keeps those in use in memory. Never text or keys."""
