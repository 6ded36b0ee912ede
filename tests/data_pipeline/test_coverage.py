"""Words outside a vocabulary, and what is cut off, are counted and told of."""

import warnings

import pytest

from m3ae_fast import M3AEFastWarning
from m3ae_fast.data import Tokenizer
from m3ae_fast.data.coverage import coverage, warn_of_words


@pytest.fixture
def tokenizer(tmp_path):
    letters = [c for letter in "abcdefghijklmnopqrstuvwxyz" for c in (letter, f"##{letter}")]
    (tmp_path / "vocab.txt").write_text("\n".join(["[UNK]", "a", "cat", "and", "sits", ",", *letters[1:]]))
    return Tokenizer.from_vocab(tmp_path / "vocab.txt")


def test_words_are_counted_as_they_are_cut(tokenizer):
    captions = ["A cat, and a Zebra", "", "zebra \u4e2d sits", "a Zebra"]
    found = coverage(tokenizer, captions, max_text_length=6)
    assert (found.captions, found.words) == (4, 11)
    assert found.cut == {"Zebra": 2, "zebra": 1, "\u4e2d": 1}
    assert found.pieces["Zebra"] == ["z", "##e", "##b", "##r", "##a"] and found.pieces["\u4e2d"] == ["[UNK]"]
    lengths = [len(tokenizer.encode(caption)) for caption in captions]
    assert found.entries == sum(lengths) and found.lost == sum(max(n - 6, 0) for n in lengths) > 0


def test_many_words_that_are_cut_are_told_of(tokenizer):
    with pytest.warns(M3AEFastWarning) as caught:
        warn_of_words(tokenizer, iter(["a cat sits , and a zebra"] * 2000), max_text_length=20)
    assert [str(each.message) for each in caught if each.category is M3AEFastWarning] == [
        "14% of the words of the first 1,000 captions are not in the vocabulary and are cut into pieces: "
        "'zebra' -> z ##e ##b ##r ##a"
    ]


def test_captions_that_are_cut_off_are_told_of(tokenizer):
    with pytest.warns(M3AEFastWarning) as caught:
        warn_of_words(tokenizer, ["a cat sits and a cat"] * 3, max_text_length=3)
    (message,) = [str(each.message) for each in caught if each.category is M3AEFastWarning]
    assert message.startswith("50% of the vocabulary entries of the first 3 captions are behind max_text_length 3")


def test_few_are_not(tokenizer):
    with warnings.catch_warnings():
        warnings.simplefilter("error", M3AEFastWarning)
        warn_of_words(tokenizer, ["a cat sits , and a cat , and a cat zebra"], max_text_length=16)
        warn_of_words(tokenizer, [], max_text_length=16)
