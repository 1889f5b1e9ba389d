"""Tasks: what is learned. A task is a name, a kind, examples and labels; a stream is ordered tasks."""
