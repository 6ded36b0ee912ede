"""A vocabulary by its name: found where Hugging Face's programs keep it, or refused with a list of places."""

import json

import pytest

from m3ae_fast.data import Tokenizer
from m3ae_fast.data.vocabularies import find_vocab, is_name

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "zebra"]


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache; the variables of other caches are not set."""
    for name in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "TRANSFORMERS_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home" / "hub"


def keep(folder, *names):
    """Files of a vocabulary in a folder, made if need be; returns the last one."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        if name == "vocab.txt":
            (folder / name).write_text("\n".join(WORDS) + "\n")
        else:
            (folder.parent / "vocab.txt").write_text("\n".join(WORDS) + "\n")
            Tokenizer.from_vocab(folder.parent / "vocab.txt").save(folder / name)
    return folder / names[-1]


@pytest.mark.parametrize("kept", ["models--bert-base-uncased", "models--google-bert--bert-base-uncased"])
@pytest.mark.parametrize("named", ["bert-base-uncased", "google-bert/bert-base-uncased"])
def test_a_name_is_found_in_the_cache(cache, named, kept):
    expected = keep(cache / kept / "snapshots" / "86b5", "vocab.txt")
    assert find_vocab(named) == expected
    assert Tokenizer.from_vocab(named).tokens([5, 6]) == ["a", "zebra"]


def test_the_main_version_comes_first(cache):
    model = cache / "models--own--words"
    keep(model / "snapshots" / "111", "vocab.txt")
    expected = keep(model / "snapshots" / "222", "vocab.txt", "tokenizer.json")
    (model / "refs").mkdir()
    (model / "refs" / "main").write_text("222")
    assert find_vocab("own/words") == expected, "and of its files the one that says more"
    (model / "refs" / "main").write_text("333")
    assert find_vocab("own/words").parent.name == "111"


@pytest.mark.parametrize("variable", ["HF_HUB_CACHE", "TRANSFORMERS_CACHE"])
def test_where_the_caches_are_is_obeyed(cache, tmp_path, monkeypatch, variable):
    monkeypatch.setenv(variable, str(tmp_path / "elsewhere"))
    expected = keep(tmp_path / "elsewhere" / "models--own--words" / "snapshots" / "1", "tokenizer.json")
    assert find_vocab("own/words") == expected


def test_paths_stay_paths(cache, tmp_path):
    assert find_vocab("nowhere.txt").name == "nowhere.txt" and find_vocab("a/b/c") and not is_name("a/b/c")
    expected = keep(tmp_path / "bert-base-uncased", "vocab.txt")
    assert find_vocab("bert-base-uncased").resolve() == expected and not is_name("bert-base-uncased")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match=r"empty must hold tokenizer.json or vocab.txt, got a folder without"):
        find_vocab("empty")


def test_what_is_not_found_says_where_it_was_looked_for(cache):
    (cache / "models--bert-base-uncased" / "snapshots" / "1").mkdir(parents=True)
    with pytest.raises(FileNotFoundError) as error:
        Tokenizer.from_vocab("bert-base-uncased")
    message = str(error.value)
    assert message.startswith("there is no vocabulary bert-base-uncased: looked for bert-base-uncased, ")
    for name in ("models--bert-base-uncased", "models--google-bert--bert-base-uncased"):
        assert str(cache / name) in message
    assert "'hf download bert-base-uncased tokenizer.json'" in message and "\n" not in message


def test_a_run_keeps_it(cache, tmp_path):
    """Resumed, and used, where the cache is gone."""
    pytest.importorskip("m3ae_fast.train", reason="needs the train extra")
    from m3ae_fast.train import RunConfig, load_run, pretrain

    words = "a an the we see this shows picture of on background no one two three four shapes and with in at to left"
    path = keep(cache / "models--own--words" / "snapshots" / "1", "vocab.txt")
    path.write_text("\n".join([*WORDS, *words.split()[1:]]))
    settings = {"steps": 2, "batch_size": 2, "image_size": 32, "device": "cpu", "picture_every": 0}
    config = RunConfig(text_vocab="own/words", **settings)
    with pytest.warns(UserWarning, match="are not in the vocabulary"):
        pretrain(config, tmp_path / "run", stop_after=1, progress=False)
    path.unlink()
    pretrain(config, tmp_path / "run", resume=True, progress=False)
    assert load_run(tmp_path / "run").tokenizer.tokens([6]) == ["zebra"]
    assert json.loads((tmp_path / "run" / "run.json").read_text())["text_vocab"] == "own/words"
