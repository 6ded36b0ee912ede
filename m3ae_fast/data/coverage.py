"""How much of captions a model gets to read: words outside its vocabulary, and what is cut off."""

from __future__ import annotations

import itertools
import warnings
from collections import Counter
from collections.abc import Iterable
from typing import NamedTuple

from m3ae_fast._warning import M3AEFastWarning
from m3ae_fast.data.text import UNKNOWN, Tokenizer

CAPTIONS = 1000  # that are looked at
SHARE = 0.1  # of words cut into pieces, or of vocabulary entries cut off, above which there is a warning
SHOWN = 3  # words that it names


class Coverage(NamedTuple):
    """Counts over some captions."""

    captions: int
    words: int
    cut: Counter  # how often each word comes that is not in the vocabulary
    pieces: dict[str, list[str]]  # the vocabulary entries that stand for it
    entries: int  # vocabulary entries of all words
    lost: int  # of those, behind the last one that the model reads of a caption


def coverage(tokenizer: Tokenizer, captions: Iterable[str], max_text_length: int) -> Coverage:
    """Look at the words of captions.

    Args:
        tokenizer: of the model. captions: all of them are counted. max_text_length: vocabulary entries that the model
            reads of each.
    """
    captions, words, entries, lost = list(captions), 0, 0, 0
    cut, pieces = Counter(), {}
    for caption in captions:
        length = 0
        for word, tokens in tokenizer.words(caption):
            words, length = words + 1, length + len(tokens)
            if len(tokens) > 1 or tokens == [UNKNOWN]:
                cut[word] += 1
                pieces[word] = tokens
        entries, lost = entries + length, lost + max(length - max_text_length, 0)
    return Coverage(len(captions), words, cut, pieces, entries, lost)


def warn_of_words(tokenizer: Tokenizer, captions: Iterable[str], max_text_length: int) -> None:
    """An M3AEFastWarning where many words of the first captions are cut into pieces, and one where much is cut off.

    Args:
        tokenizer, max_text_length: as of `coverage`. captions: of which the first 1,000 are looked at.
    """
    found = coverage(tokenizer, itertools.islice(captions, CAPTIONS), max_text_length)
    said, cut = f"of the first {found.captions:,} captions", found.cut.total()
    if cut > SHARE * found.words:
        shown = ", ".join(f"{word!r} -> {' '.join(found.pieces[word])}" for word, _ in found.cut.most_common(SHOWN))
        message = f"{cut / found.words:.0%} of the words {said} are not in the vocabulary and are cut into pieces"
        warnings.warn(f"{message}: {shown}", M3AEFastWarning, stacklevel=2)
    if found.lost > SHARE * found.entries:
        message = f"{found.lost / found.entries:.0%} of the vocabulary entries {said} are behind max_text_length "
        message += f"{max_text_length} and are never read; --set max_text_length=N reads more of a caption"
        warnings.warn(message, M3AEFastWarning, stacklevel=2)
