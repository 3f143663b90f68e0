"""Time and memory of one generator step, side by side with the peers."""
