"""Thin factories for other libraries' training loops."""
