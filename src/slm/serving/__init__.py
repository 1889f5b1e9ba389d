"""Serving: requests → rows → answers over HTTP, in OpenAI's shapes. Never trains."""
