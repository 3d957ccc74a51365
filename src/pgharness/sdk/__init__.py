"""Experiments in code: what is registered, how it is found, and what runs it."""
