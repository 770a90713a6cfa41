"""What `bench` measures with."""
