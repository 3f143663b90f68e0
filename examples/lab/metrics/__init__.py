"""The metrics of samples."""
