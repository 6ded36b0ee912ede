"""Scores: figures of examples, each a `Result` beside its chance level, and the table and file of them."""
