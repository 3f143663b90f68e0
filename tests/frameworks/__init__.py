"""The real frameworks, of the extra ``frameworks``; without it these tests are skipped."""
