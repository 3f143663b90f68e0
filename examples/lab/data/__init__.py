"""The data of the experiments: points, digits, images."""
