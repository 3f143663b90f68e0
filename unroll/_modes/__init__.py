"""Modes: functions from a step to a step with the same results."""
