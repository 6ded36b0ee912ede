"""docs/integrations/masked_tokens.md: its example does what it says."""

import re
from pathlib import Path

import torch

PAGE = Path(__file__).parents[2] / "docs/integrations/masked_tokens.md"


def test_packed_rows_stand_for_sorted_and_padded_ones():
    """Each sample's kept tokens are encoded as they are alone, and stand where they stood."""
    torch.manual_seed(0)
    found = {}
    exec(re.search(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)[1], found)
    tokens, mask, encoded = (found[name] for name in ("tokens", "mask", "encoded"))
    assert not encoded[mask].any()
    for sample, removed, result in zip(tokens, mask, encoded, strict=True):
        kept = sample[~removed]
        alone = found["encoder"](kept, found["SeqLens"]([len(kept)]))
        torch.testing.assert_close(result[~removed], alone, rtol=1e-5, atol=1e-5)
