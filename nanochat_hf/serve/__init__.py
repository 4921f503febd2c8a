"""WEIGHTS -> PEOPLE: fast generation, terminal chat, HTTP server, and the Hub."""
