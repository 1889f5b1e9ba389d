"""Backbone (JARe): frozen Hugging Face models, re-parameterized row by row. Never learns or retrieves."""
