"""How a data set says that it cannot give a sample."""

LONGEST = 1000  # characters of a message


class BadSample(Exception):
    """A sample that cannot be read: its file is damaged, or holds neither an image nor a caption.

    Args:
        name: of the sample. reason: what is wrong with it.
        kind: what is damaged, for the counts: "image", "caption", "label", "shard" (the file that holds it), "row", or
            "sample"; "channels": an image has others than wanted; or, where nothing is, why it is left out: "unpaired",
            "unlabeled".
    """

    def __init__(self, name: str, reason: str, kind: str = "sample"):
        super().__init__(name, reason, kind)  # all, so that it pickles
        self.name, self.reason, self.kind = name, reason, kind

    def __str__(self) -> str:
        """In a line of a terminal: names and reasons come from files, which may hold anything."""
        text = f"{self.name}: {self.reason}"
        text = text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
