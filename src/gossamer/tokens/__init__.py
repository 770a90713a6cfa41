"""Text to token ids and back, as transformers does it, without transformers."""
