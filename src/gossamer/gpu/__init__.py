"""Sparse products on GPUs."""
