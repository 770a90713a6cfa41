"""Text and rows of tokens."""
