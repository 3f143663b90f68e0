"""Shared parts of the experiments: data with known modes, resumable runs, records and figures."""
