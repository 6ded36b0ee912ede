"""Statements about two images: what is reported, and that they are learned."""

from m3ae_fast.downstream import Statement
from m3ae_fast.downstream.tasks.reason import reason, train_reason
from m3ae_fast.models.reason import Reason
from tests.downstream.tasks.tiny import TOKENIZER, make, plain, values


def test_statements_are_learned():
    """The same sentence for all: the images tell."""
    statements = [
        Statement(plain(a), plain(b), "both are the same", a == b, f"{a} {b}", "same" if a == b else "")
        for a in ("red", "blue")
        for b in ("red", "blue")
    ]
    model = Reason(make())
    losses = train_reason(model, statements, TOKENIZER, steps=40, lr=3e-3, progress=False)
    assert losses[-1] < 0.2 * losses[0]
    results = reason(model, statements, TOKENIZER, batch_size=3)
    assert values(results) == {"accuracy": 1, "accuracy, no kind": 1, "accuracy, same": 1}
    assert results[0].count == 4 and [r.count for r in results[1:]] == [2, 2]
    turned = [Statement(s.left, s.right, s.sentence, not s.label, s.name) for s in statements]
    assert values(reason(model, turned, TOKENIZER)) == {"accuracy": 0}
