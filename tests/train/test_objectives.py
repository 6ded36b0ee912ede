"""Every objective of `pretrain`: it learns, resumes to the bit with all it holds, logs and draws what it has."""

import dataclasses

import pytest
import torch
from PIL import Image

from m3ae_fast import M3AEFastWarning
from m3ae_fast.models import OBJECTIVES
from m3ae_fast.train import RunConfig, load_run, metrics, pretrain, trainer
from m3ae_fast.train.pictures import draw_reconstruction, held_out

QUEUE = {"queue_size": 8, "soft_targets": 0.4}


@pytest.fixture
def go(tmp_path, monkeypatch):
    """go(objective, out, **settings): the rows of a run of four steps, without the rate."""
    monkeypatch.setattr(trainer, "draw_pictures", lambda *_: None)

    def call(objective, out="run", *, resume=False, stop_after=None, **changes):
        settings = {"steps": 4, "batch_size": 4, "image_size": 32, "device": "cpu", "objective": objective}
        config = RunConfig(**(settings | changes))
        pretrain(config, tmp_path / out, resume=resume, stop_after=stop_after, progress=False)
        rows = metrics.read(tmp_path / out / "metrics.jsonl")
        return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]

    return call


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_resumed_it_gives_the_same_bits(go, tmp_path, objective):
    options = {"options": QUEUE} if objective == "mamo" else {}
    whole = go(objective, "whole", **options)
    go(objective, "parts", stop_after=2, **options)
    assert go(objective, "parts", resume=True, **options) == whole
    assert tuple(whole[0]) == ("step", *OBJECTIVES[objective][0].METRICS, "lr", "bad_steps")
    a, b = (load_run(tmp_path / name).model.state_dict() for name in ("whole", "parts"))
    assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
    if objective == "mamo":
        assert a["contrast.queued"] == 16 and any(name.startswith("target.") for name in a)


@pytest.mark.parametrize(
    ("objective", "masking"),
    [("m3ae", "block"), ("mae", "multi_block"), ("m3ae", "ratio_range"), ("m3ae", "dirichlet")],
)
def test_masking_is_a_setting_of_the_run(go, tmp_path, objective, masking):
    whole, plain = go(objective, "whole", masking=masking), go(objective, "plain")
    go(objective, "parts", masking=masking, stop_after=2)
    assert go(objective, "parts", resume=True) == whole
    assert all(ours["loss"] != theirs["loss"] for ours, theirs in zip(whole, plain, strict=True))
    run = load_run(tmp_path / "parts")
    assert run.config.masking == run.model.config.masking == masking
    with pytest.raises(ValueError, match=f"masking: '{masking}' there, 'sample' asked for"):
        go(objective, "parts", masking="sample", resume=True)


@pytest.mark.parametrize("objective", ["m3ae", "mae"])
def test_the_decoder_is_a_setting_of_the_run(go, tmp_path, objective):
    """Of a part, by cross-attention: it resumes, validates, encodes and draws as any other."""
    settings = {"options": {"decoder": "cross", "predict_ratio": 0.5}, "val_data": "shapes"}
    whole, plain = go(objective, "whole", **settings), go(objective, "plain", val_data="shapes")
    go(objective, "parts", stop_after=2, **settings)
    assert go(objective, "parts", resume=True) == whole
    assert whole[-1]["val_loss"] != plain[-1]["val_loss"]
    run = load_run(tmp_path / "parts")
    assert (run.model.config.decoder, run.model.config.predict_ratio) == ("cross", 0.5)
    state = load_run(tmp_path / "whole").model.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())
    batch = held_out(run.model.config, run.tokenizer, run.config, count=3)
    assert run.model.encode_cls(batch).isfinite().all()
    draw_reconstruction(run.model, run.tokenizer, batch, tmp_path / "drawn.png")
    assert min(Image.open(tmp_path / "drawn.png").size) > 100
    with pytest.raises(ValueError, match=r"options\.decoder: 'cross' there, 'joint' asked for"):
        go(objective, "parts", resume=True, options={"decoder": "joint"})


def test_the_momentum_network_moves_once_a_step(go, tmp_path):
    go("mamo", accumulate=2, options={"momentum": 1.0})
    run = load_run(tmp_path / "run")
    torch.manual_seed(run.config.seed)
    fresh = OBJECTIVES["mamo"][0](run.model.config)
    for a, b in zip(run.model.target.parameters(), fresh.online.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(run.model.online.image.cls_token, fresh.online.image.cls_token)
    updates = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OBJECTIVES["mamo"][0], "update_target", lambda self: updates.append(1))
        go("mamo", "counted", accumulate=3)
    assert len(updates) == 4


def test_a_checkpoint_of_another_objective_is_refused(go):
    go("clip", stop_after=2)
    with pytest.raises(ValueError, match="objective: 'clip' there, 'mamo' asked for"):
        go("mamo", resume=True)


def test_options_are_fields_of_the_model(go, tmp_path):
    rows = go("mamo", masking="simultaneous", options={"mim_weight": 0})
    assert all(row["mim_loss"] == 0 < row["mrm_loss"] for row in rows)
    assert load_run(tmp_path / "run").model.config.masking == "simultaneous"
    with pytest.raises(ValueError, match="mim_weight: the configuration of clip has no such field"):
        go("clip", "other", options={"mim_weight": 0})
    for name in ("vocab_size", "image_size", "masking"):
        with pytest.raises(ValueError, match=f"options must not hold {name}: image_size, .* are settings of their own"):
            go("mamo", "other", options={name: 64})
    with pytest.raises(ValueError, match="text_mask_ratio: the configuration of supervised has no such field"):
        go("supervised", "other", text_mask_ratio=0.5)
    with pytest.raises(ValueError, match="masking: the configuration of clip has no such field"):
        go("clip", "other", masking="block")
    with pytest.raises(ValueError, match="masking must be one of 'two_pass', 'simultaneous', got 'block'"):
        go("mamo", "other", masking="block")


def test_mae_leaves_captions_aside(go, tmp_path):
    rows = go("mae")
    assert all(row["text_loss"] == 0 for row in rows) and load_run(tmp_path / "run").tokenizer is None


@pytest.fixture
def folder(tmp_path):
    """Two classes, three images, two captions."""
    for name, color, caption in (
        ("cat/a", "red", "a red one"),
        ("cat/b", "blue", None),
        ("dog/c", "green", "a green one"),
    ):
        path = tmp_path / "data" / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), color).save(path)
        if caption:
            path.with_suffix(".txt").write_text(caption)
    return tmp_path / "data"


def test_what_is_no_pair_is_left_out_and_told(go, folder):
    with pytest.warns(M3AEFastWarning, match=r"cat/b.png: pairs are wanted, there is no caption; left out"):
        assert len(go("clip", data=str(folder))) == 4


@pytest.mark.filterwarnings("ignore:.*pairs are wanted")
def test_pictures_leave_out_what_is_no_pair(folder, tmp_path):
    config = RunConfig(objective="mamo", data=str(folder), steps=1, batch_size=2, image_size=32, device="cpu")
    pretrain(config, tmp_path / "run", progress=False)
    assert (tmp_path / "run" / "pictures" / "words-00000001.png").is_file()


def test_a_folder_of_classes_trains_a_supervised_model(go, folder, tmp_path):
    go("supervised", data=str(folder))
    assert load_run(tmp_path / "run").model.config.classes == 2


def test_data_must_have_what_an_objective_needs(go, tmp_path):
    Image.new("RGB", (40, 40)).save(tmp_path / "alone.png")
    with pytest.raises(ValueError, match="data must have captions to train mamo"):
        go("mamo", data=str(tmp_path))
    with pytest.raises(ValueError, match="data must have classes, a subfolder for each"):
        go("supervised", data=str(tmp_path))


@pytest.mark.parametrize("objective", ["mamo", "clip", "supervised"])
def test_pictures(tmp_path, objective):
    config = RunConfig(objective=objective, steps=2, batch_size=4, image_size=32, device="cpu")
    pretrain(config, tmp_path, progress=False)
    drawn = sorted(path.name for path in (tmp_path / "pictures").iterdir())
    words = ["words-00000001.png", "words-00000002.png"] if objective == "mamo" else []
    assert drawn == ["losses.png", *words]
    for name in drawn:
        assert min(Image.open(tmp_path / "pictures" / name).size) > 200


def test_a_run_of_another_objective_is_refused(go, tmp_path):
    go("clip")
    assert load_run(tmp_path / "run", objectives=("mamo", "clip")).config.objective == "clip"
    with pytest.raises(ValueError, match="run must be a run of the objective m3ae or mae, got clip"):
        load_run(tmp_path / "run", objectives=("m3ae", "mae"))


def test_a_run_without_an_objective_is_an_m3ae(go, tmp_path):
    """run.json of before objectives were known."""
    go("m3ae", stop_after=2)
    known = {field.name for field in dataclasses.fields(RunConfig)}
    assert {"objective", "options"} <= known and RunConfig().objective == "m3ae"
