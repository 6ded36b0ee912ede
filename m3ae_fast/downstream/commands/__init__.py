"""What the commands of the tasks share: arguments, and how a run is opened and results are written."""
