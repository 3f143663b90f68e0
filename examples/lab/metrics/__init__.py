"""What samples are measured by."""
