"""What `evaluate` measures with."""
