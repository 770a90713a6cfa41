"""Hugging Face directories: tensors in, and whole directories out."""
