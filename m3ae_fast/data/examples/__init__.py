"""Examples of the tasks, drawn with truths that are known (`shapes`) or read from a user's files (`files`)."""
