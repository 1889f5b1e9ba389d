"""Retrieval (DTKR): text or hidden states -> query -> weights over keys. Never an increment's values."""
