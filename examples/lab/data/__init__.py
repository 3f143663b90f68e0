"""What the experiments train on: points, digits, images."""
