"""The OpenAI-compatible server: no torch."""

from gossamer.server.serve import Serve, ServeResult, serve

__all__ = ["Serve", "ServeResult", "serve"]
