"""What says whether a gradient is right: its two terms, and central differences."""
