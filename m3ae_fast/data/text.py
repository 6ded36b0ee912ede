"""Tokenizer: WordPiece as BERT does it, no special token added."""

from __future__ import annotations

import itertools
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from tokenizers import Tokenizer as _Tokenizer
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from m3ae_fast import _checks
from m3ae_fast._files import replacing
from m3ae_fast.data.limits import check_file
from m3ae_fast.data.vocabularies import find_vocab

UNKNOWN = "[UNK]"
SPECIALS = ("[PAD]", UNKNOWN, "[CLS]", "[SEP]", "[MASK]")  # M3AE uses [UNK] alone; BERT's tools expect all five
CONTINUES = "##"


class Tokenizer:
    """Text to vocabulary ids and back: lower case, accents stripped, split at spaces and punctuation, then WordPiece.

    Made by `from_vocab`, `train` or `load`.

    Args:
        tokenizer: a `tokenizers.Tokenizer`; its padding and truncation are switched off.
    """

    def __init__(self, tokenizer: _Tokenizer):
        if tokenizer.decoder is None:
            tokenizer.decoder = decoders.WordPiece(prefix=CONTINUES)
        tokenizer.no_padding()  # a tokenizer.json may ask for both, and lengths would lie
        tokenizer.no_truncation()
        self._tokenizer = tokenizer

    @classmethod
    def from_vocab(cls, path: str | os.PathLike) -> Tokenizer:
        """A vocabulary made elsewhere: `vocab.txt`, a token a line, or a `tokenizer.json` (any name ending in .json).

        Args:
            path: of the file, of a folder that holds it, or a model's name in a cache of Hugging Face's,
                "bert-base-uncased" (`find_vocab`).
        Raises:
            OSError, ValueError: naming the file and what is wrong in it, or where it was looked for.
        """
        path = find_vocab(path)
        if path.suffix == ".json":
            return cls.load(path)
        check_file(path)
        try:
            tokens = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must hold UTF-8 text, a token a line: {error}") from None
        seen = set()
        for line, token in enumerate(tokens, 1):
            if not token or token in seen:
                raise ValueError(f"{path} must hold a token a line, each once, got {token!r} on line {line}")
            seen.add(token)
        if UNKNOWN not in tokens:
            raise ValueError(f"{path} must hold the token {UNKNOWN}, got {len(tokens)} tokens without it")
        return cls(_wordpiece(tokens))

    @classmethod
    def train(cls, captions: Iterable[str], vocab_size: int) -> Tokenizer:
        """A vocabulary of at most `vocab_size` entries made from captions: the same captions, the same vocabulary.

        Raises:
            ValueError: vocab_size leaves no room, or there is no caption.
        """
        captions = list(captions)
        blank = _wordpiece([UNKNOWN])
        counts = Counter(c for caption in captions for c in blank.normalizer.normalize_str(caption) if not c.isspace())
        if not counts:
            raise ValueError(f"captions must hold words to make a vocabulary from, got {len(captions)} captions")
        _checks.integer("vocab_size", vocab_size, len(SPECIALS) + 4)
        # A character costs two entries, c and ##c: the rarest become [UNK] where they would fill over half of all.
        room = max(1, (vocab_size // 2 - len(SPECIALS)) // 2)
        alphabet = sorted(sorted(counts, key=lambda c: (-counts[c], c))[:room])
        trainer = trainers.WordPieceTrainer(
            vocab_size=vocab_size,
            # The trainer numbers its ##c in the order of a hash map, seeded anew in each process: number them here.
            special_tokens=[*SPECIALS, *(CONTINUES + c for c in alphabet)],
            initial_alphabet=alphabet,
            limit_alphabet=len(alphabet),
            continuing_subword_prefix=CONTINUES,
            show_progress=False,
        )
        blank.train_from_iterator(captions, trainer)
        vocab = blank.get_vocab()
        return cls(_wordpiece(sorted(vocab, key=vocab.get)))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Tokenizer:
        """What `save` wrote, or any other tokenizer.json.

        Raises:
            OSError, ValueError: naming the file.
        """
        check_file(path)
        try:
            return cls(_Tokenizer.from_str(Path(path).read_text(encoding="utf-8")))
        except OSError:
            raise
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} must be a tokenizer.json that `tokenizers` can read: {error}") from None

    def save(self, path: str | os.PathLike) -> None:
        """Write a tokenizer.json, whole or not at all.

        Raises:
            OSError: naming the file, on a full disk for instance.
        """
        with replacing(Path(path)) as temporary:
            temporary.write_text(self._tokenizer.to_str(pretty=True), encoding="utf-8")

    def encode(self, text: str) -> list[int]:
        """The text's ids, [] for a blank one; a word outside the vocabulary is [UNK]."""
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def words(self, text: str) -> Iterator[tuple[str, list[str]]]:
        """Each word of a text, as it is written there, and the vocabulary entries that stand for it: several where the
        word itself is not an entry."""
        encoded = self._tokenizer.encode(text, add_special_tokens=False)
        entries = zip(encoded.word_ids, encoded.offsets, encoded.tokens, strict=True)
        for _, pieces in itertools.groupby(entries, key=lambda entry: entry[0]):
            _, places, tokens = zip(*pieces, strict=True)
            yield text[places[0][0] : places[-1][1]], list(tokens)

    def id_of(self, token: str) -> int | None:
        """The number of a vocabulary entry; None: there is no such entry."""
        return self._tokenizer.token_to_id(token)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The vocabulary entry of each id; ValueError for an id outside."""
        for i in ids:
            if not 0 <= i < self.vocab_size:
                raise ValueError(f"ids must be in [0, {self.vocab_size}), got {i}")
        return [self._tokenizer.id_to_token(i) for i in ids]

    def decode(self, ids: Sequence[int]) -> str:
        """Words again, pieces joined, in lower case; ValueError for an id outside."""
        return self._tokenizer.decoder.decode(self.tokens(ids))

    @property
    def vocab_size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __repr__(self) -> str:
        return f"Tokenizer({self.vocab_size} entries)"


def _wordpiece(tokens: Sequence[str]) -> _Tokenizer:
    """BERT's uncased tokenizer with this vocabulary, token i numbered i."""
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = _Tokenizer(models.WordPiece(vocab, unk_token=UNKNOWN, continuing_subword_prefix=CONTINUES))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer
