"""Requests to rows to answers over HTTP."""
