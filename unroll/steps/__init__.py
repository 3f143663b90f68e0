"""The K look-ahead steps of the discriminator (Eq. 6 to 8)."""
