"""How a data set says that it cannot give a sample."""


class BadSample(Exception):
    """A sample that cannot be read: its file is damaged, or holds neither an image nor a caption.

    Args:
        name: of the sample. reason: what is wrong with it.
        kind: what is damaged, for the counts: "image", "caption", "shard" (the file that holds it), "row", or "sample";
            or, where nothing is, why it is left out: "unpaired", "unlabelled".
    """

    def __init__(self, name: str, reason: str, kind: str = "sample"):
        super().__init__(name, reason, kind)  # all, so that it pickles
        self.name, self.reason, self.kind = name, reason, kind

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"
