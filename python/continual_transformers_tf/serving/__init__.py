"""The stream server: its program, its client, and the load test."""
