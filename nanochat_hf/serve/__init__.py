"""Weights to people: fast generation, HTTP server, terminal chat."""
