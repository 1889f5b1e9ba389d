"""Learning: prepare, fine-tune, commit."""
