"""Integrations with the training loops of other libraries."""
