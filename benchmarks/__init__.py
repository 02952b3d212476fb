"""Measurements that the documentation quotes: scripts, not tests, each leaving JSON and plots."""
