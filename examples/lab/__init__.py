"""What the experiments share: data with known modes, resumable runs, records and figures."""
