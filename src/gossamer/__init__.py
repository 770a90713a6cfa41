"""Gossamer makes a Llama sparse, wins its accuracy back, and runs it fast on CPUs."""
