"""The papers' tables in miniature: tiny models on `cluttered`, trained and scored by one command."""

from m3ae_fast.experiments.plan import CLAIMS, RUNS, TABLES, Scale, config_of
from m3ae_fast.experiments.report import write_report
from m3ae_fast.experiments.run import experiments, train_and_score

__all__ = ["CLAIMS", "RUNS", "TABLES", "Scale", "config_of", "experiments", "train_and_score", "write_report"]
