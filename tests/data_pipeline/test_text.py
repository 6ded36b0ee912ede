"""Tokenizer: BERT's WordPiece, reproducible, with errors that name the file."""

import json
import os

import pytest

from m3ae_fast.data import ShapesDataset, Tokenizer

VOCAB = ["[PAD]", "[UNK]", "a", "cat", "sit", "##s", "##ting", ",", "cafe"]


@pytest.fixture
def vocab(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


def test_from_vocab(vocab):
    tokenizer = Tokenizer.from_vocab(vocab)
    assert tokenizer.vocab_size == len(VOCAB)
    ids = tokenizer.encode("A CAT,sits  sitting Café dogs")
    assert tokenizer.tokens(ids) == ["a", "cat", ",", "sit", "##s", "sit", "##ting", "cafe", "[UNK]"]
    assert ids == [2, 3, 7, 4, 5, 4, 6, 8, 1], "an id is its line, and no [CLS] or [SEP] is added"
    assert tokenizer.decode(ids) == "a cat, sits sitting cafe [UNK]"


def test_blank_text(vocab):
    tokenizer = Tokenizer.from_vocab(vocab)
    assert tokenizer.encode("") == tokenizer.encode(" \t\n") == []
    assert tokenizer.tokens([]) == [] and tokenizer.decode([]) == ""


def test_windows_line_ends(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_bytes("\r\n".join(VOCAB).encode())
    assert Tokenizer.from_vocab(path).encode("cat") == [3]


def test_training_is_reproducible():
    """The library's own trainer numbers ##c by the order of a hash map, which differs from call to call."""
    captions = list(ShapesDataset(32).captions())[:600]
    first, second = (Tokenizer.train(captions, vocab_size=120) for _ in range(2))
    assert first.tokens(range(first.vocab_size)) == second.tokens(range(second.vocab_size))
    assert first.vocab_size == 120
    assert first.encode(captions[0]) == second.encode(captions[0])


def test_trained_words():
    captions = list(ShapesDataset(32).captions())
    tokenizer = Tokenizer.train(iter(captions), vocab_size=1000)
    assert 100 < tokenizer.vocab_size < 1000, "few words make a small vocabulary"
    for caption in captions[:200]:
        ids = tokenizer.encode(caption)
        assert len(ids) == len(caption.replace(",", " ,").split()), "every word is one entry"
        assert tokenizer.decode(ids) == caption
    assert tokenizer.tokens([0, 1]) == ["[PAD]", "[UNK]"]


def test_rare_characters_leave_room():
    captions = ["common words", "common words", "".join(map(chr, range(0x4E00, 0x4F00)))]
    tokenizer = Tokenizer.train(captions, vocab_size=60)
    assert tokenizer.vocab_size <= 60
    assert "[UNK]" not in tokenizer.tokens(tokenizer.encode("common words"))
    assert "[UNK]" in tokenizer.tokens(tokenizer.encode(captions[2]))


def test_training_arguments():
    with pytest.raises(ValueError, match="captions must hold words to make a vocabulary from, got 2 captions"):
        Tokenizer.train([" ", ""], vocab_size=100)
    with pytest.raises(ValueError, match="vocab_size must be at least 9, got 3"):
        Tokenizer.train(["a"], vocab_size=3)


def test_save_and_load(tmp_path):
    tokenizer = Tokenizer.train(["a small red circle", "ein großer Kreis", "猫"], vocab_size=100)
    path = tmp_path / "tokenizer.json"
    tokenizer.save(path)
    assert os.listdir(tmp_path) == ["tokenizer.json"], "no temporary file is left"
    for again in (Tokenizer.load(path), Tokenizer.from_vocab(path)):
        assert again.tokens(range(again.vocab_size)) == tokenizer.tokens(range(tokenizer.vocab_size))
        for text in ("small circles", "großer 猫 Kreis", ""):
            assert again.encode(text) == tokenizer.encode(text)
            assert again.decode(again.encode(text)) == tokenizer.decode(tokenizer.encode(text))


def test_saving_replaces_the_file_and_never_writes_into_it(tmp_path):
    path, link = tmp_path / "tokenizer.json", tmp_path / "link"
    path.write_text("old")
    os.link(path, link)
    Tokenizer.train(["a circle"], vocab_size=50).save(path)
    assert link.read_text() == "old" and Tokenizer.load(path).encode("circle")


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    tokenizer = Tokenizer.train(["a circle"], vocab_size=50)
    path = tmp_path / "tokenizer.json"
    path.write_text("old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left.*tokenizer\.json"):
        tokenizer.save(path)
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["tokenizer.json"]


def test_a_file_that_pads_and_truncates(vocab, tmp_path):
    """Lengths stay true whatever a tokenizer.json asks for."""
    path = tmp_path / "tokenizer.json"
    Tokenizer.from_vocab(vocab).save(path)
    content = json.loads(path.read_text())
    content["truncation"] = {"max_length": 2, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    content["padding"] = {
        **{"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None},
        **{"pad_id": 0, "pad_type_id": 0, "pad_token": "[PAD]"},
    }
    path.write_text(json.dumps(content))
    assert Tokenizer.load(path).encode("a cat a") == [2, 3, 2]


@pytest.mark.parametrize(
    "content, message",
    [
        (b"a\nb\n", r"hold the token \[UNK\], got 2 tokens without it"),
        (b"[UNK]\na\na\n", "hold a token a line, each once, got 'a' on line 3"),
        (b"[UNK]\n\na\n", "hold a token a line, each once, got '' on line 2"),
        (b"", "got '' on line 1"),
        (b"[UNK]\n\xff\n", "hold UTF-8 text, a token a line"),
    ],
)
def test_bad_vocab(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"vocab\.txt must .*{message}"):
        Tokenizer.from_vocab(path)


def test_bad_files(tmp_path):
    for name in ("vocab.txt", "tokenizer.json"):
        with pytest.raises(FileNotFoundError, match=name):
            Tokenizer.from_vocab(tmp_path / name)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json must be a tokenizer\.json that `tokenizers` can read"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_ids_outside(vocab):
    tokenizer = Tokenizer.from_vocab(vocab)
    for function in (tokenizer.tokens, tokenizer.decode):
        for wrong in (-1, len(VOCAB)):
            with pytest.raises(ValueError, match=rf"ids must be in \[0, {len(VOCAB)}\), got {wrong}"):
                function([2, wrong])
