"""The tasks, a module each: what a trained model is asked, and how it is trained for that."""
