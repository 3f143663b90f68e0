"""The pages of docs/results, written from the records: a module a section."""
