"""Whole runs that are made of stages."""
