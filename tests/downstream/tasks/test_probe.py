"""Linear classification: closed form against refitting, descent against its formulas."""

import pytest
import torch
import torch.nn.functional as F

from m3ae_fast.downstream.features import Features
from m3ae_fast.downstream.tasks.probe import LARS, METHODS, STRENGTHS, LinearProbe, fit_probe
from m3ae_fast.downstream.tasks.probe import probe as linear_probe


def blobs(count, *, classes=3, width=6, spread=1.0, seed=0):
    """Gaussian classes around fixed centers, of features of unlike scales."""
    centers = torch.randn(classes, width, generator=torch.Generator().manual_seed(9)) * 2
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    scale = torch.logspace(-2, 2, width)
    return Features((centers[labels] + spread * torch.randn(count, width, generator=generator)) * scale, labels)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_separable_is_learned(method):
    options = {} if method == "ridge" else {"batch_size": 50, "lr": {"lars": 50.0, "sgd": 0.5}[method]}
    result = linear_probe(blobs(300, spread=0.3), blobs(200, spread=0.3, seed=1), method=method, **options)
    assert result.name == "accuracy" and result.value > 0.97 and result.count == 200 and result.error is not None
    commonest = blobs(200, spread=0.3, seed=1).labels.bincount().max().item()
    assert result.chance == pytest.approx(commonest / 200)


@pytest.mark.parametrize("method", METHODS)
def test_noise_is_at_chance(method):
    train, test = (
        (torch.randn(400, 5, generator=torch.Generator().manual_seed(s)), torch.arange(400) % 4) for s in (1, 2)
    )
    assert abs(linear_probe(Features(*train), Features(*test), method=method).value - 0.25) < 0.08


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_again(method):
    train = blobs(100, spread=2.0)
    one, other = (fit_probe(train, method=method, seed=3).state_dict() for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("count, width, crops", [(40, 6, 1), (30, 50, 1), (60, 30, 3)])
def test_ridge_is_the_best_of_all_strengths_refitted_without_each_image(count, width, crops):
    train = repeated(blobs(count // crops, width=width, spread=3.0), crops)
    x = train.cls.double()
    x = (x - x.mean(0)) / (x.var(0, correction=0) + 1e-5).sqrt()
    y = F.one_hot(train.labels, 3).double()

    def fit(x, y, strength):
        middle = y.mean(0)
        shift = x.mean(0)
        gram = (x - shift).T @ (x - shift) + count * strength * torch.eye(width, dtype=torch.float64)
        weight = torch.linalg.solve(gram, (x - shift).T @ (y - middle))
        return weight, middle - shift @ weight

    right, guesses = {}, {}
    for strength in STRENGTHS:
        guesses[strength] = []
        for i in range(count):
            others = (torch.arange(count) - i) % (count // crops) != 0
            weight, bias = fit(x[others], y[others], strength)
            guesses[strength].append(x[i] @ weight + bias)
        guesses[strength] = torch.stack(guesses[strength])
        right[strength] = int((guesses[strength].argmax(1) == train.labels).sum())
    chosen = max(strength for strength in STRENGTHS if right[strength] == max(right.values()))
    assert len(set(right.values())) > 1, "the strength matters here"
    weight, bias = fit(x, y, chosen)
    entropy = {2.0**k: F.cross_entropy(2.0**k * guesses[chosen], train.labels).item() for k in range(11)}
    scale = min(entropy, key=entropy.get)
    assert 1 < scale < 1024, "the scale matters here"
    probe = fit_probe(train, crops=crops)
    with torch.no_grad():
        torch.testing.assert_close(probe(train.cls).double(), scale * (x @ weight + bias), atol=1e-3, rtol=1e-4)


def repeated(features, crops):
    """Features of as many crops of each image, in the order of `Crops`; the first are the features given."""
    cls, labels = features.cls.repeat(crops, 1), features.labels.repeat(crops)
    noise = torch.randn(cls.shape, generator=torch.Generator().manual_seed(5))
    noise[: len(features.labels)] = 0
    return Features(cls + 0.1 * cls.std(0) * noise, labels)


def test_logits_of_new_features_do_not_depend_on_their_batch():
    for method in METHODS:
        probe, new = fit_probe(blobs(100), method=method), blobs(8, seed=5).cls
        torch.testing.assert_close(probe(new)[3], probe(new[3:4])[0])


@pytest.mark.parametrize("method", METHODS)
def test_mean_and_variance_are_those_of_the_training_features(method):
    train = blobs(64)
    probe = fit_probe(train, method=method, batch_size=24, epochs=2)
    torch.testing.assert_close(probe.norm.running_mean, train.cls.mean(0))
    torch.testing.assert_close(probe.norm.running_var, train.cls.var(0, correction=0))


def test_lars_step_by_step():
    w, b = torch.nn.Parameter(torch.tensor([[3.0, 4.0]])), torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = LARS([w, b], lr=0.5, momentum=0.9, trust=0.1)
    w.grad, b.grad = torch.tensor([[0.0, 2.0]]), torch.tensor([2.0])
    optimizer.step()  # |w| = 5, |g| = 2: the step of w is 0.5 * 0.1 * 5 / 2 * g
    torch.testing.assert_close(w.data, torch.tensor([[3.0, 3.75]]))
    torch.testing.assert_close(b.data, torch.tensor([0.0]))
    length = (3**2 + 3.75**2) ** 0.5
    optimizer.step()
    torch.testing.assert_close(w.data, torch.tensor([[3.0, 3.75 - 0.5 * (0.9 * 0.5 + 0.1 * length)]]))
    torch.testing.assert_close(b.data, torch.tensor([-0.5 * (0.9 * 2 + 2)]))
    w.grad = torch.zeros(1, 2)
    optimizer.step()
    assert w.isfinite().all(), "no gradient, no division by its length"


def test_a_class_that_was_never_trained_counts_as_wrong():
    test = blobs(50, spread=0.1, seed=2)
    result = linear_probe(blobs(100, spread=0.1), test._replace(labels=torch.where(test.labels == 0, 3, test.labels)))
    assert result.value == pytest.approx((test.labels != 0).double().mean().item())


def test_a_constant_feature_does_no_harm():
    train, test = blobs(100, spread=0.3), blobs(50, spread=0.3, seed=1)
    wide = (Features(F.pad(part.cls, (0, 1), value=7.0), part.labels) for part in (train, test))
    assert linear_probe(*wide).value == linear_probe(train, test).value


def test_of_few_samples_and_of_one_class():
    probe = fit_probe(Features(torch.tensor([[0.0], [1.0]]), torch.tensor([0, 1])))
    assert probe(torch.tensor([[-1.0], [2.0]])).argmax(1).tolist() == [0, 1]
    assert fit_probe(Features(torch.randn(4, 2), torch.zeros(4, dtype=torch.int64)))(torch.randn(3, 2)).shape == (3, 1)


GOOD = blobs(10)


@pytest.mark.parametrize(
    "train, options, error, message",
    [
        (GOOD, {"method": "magic"}, ValueError, "method must be one of 'ridge', 'lars', 'sgd', got 'magic'"),
        (GOOD, {"classes": 2}, ValueError, r"train.labels must be in \[0, 2\)"),
        (GOOD, {"method": "sgd", "epochs": 0}, ValueError, "epochs must be at least 1, got 0"),
        (GOOD, {"method": "sgd", "batch_size": 1}, ValueError, "batch_size must be at least 2, got 1"),
        (GOOD, {"method": "sgd", "lr": -1.0}, ValueError, "lr must be finite and positive, got -1.0"),
        (GOOD, {"method": "lars", "lr": float("nan")}, ValueError, "lr must be finite and positive, got nan"),
        (GOOD, {"crops": 0}, ValueError, "crops must be at least 1, got 0"),
        (GOOD, {"crops": 3}, ValueError, "train must hold two images or more, 3 times all of them in order"),
        (GOOD, {"crops": 10}, ValueError, "train must hold two images or more, 10 times all of them in order"),
        (GOOD, {"crops": 5}, ValueError, "train must hold two images or more, 5 times all of them in order"),
        (GOOD._replace(labels=GOOD.labels[:4]), {}, ValueError, r"train.labels must have shape \(10,\), got \(4,\)"),
        (GOOD._replace(labels=GOOD.labels.int()), {}, TypeError, "train.labels must be of dtype int64, got int32"),
        (GOOD._replace(cls=GOOD.cls.double()), {}, TypeError, "train.cls must be of dtype float32, got float64"),
        (GOOD._replace(cls=GOOD.cls / 0), {}, ValueError, "train.cls must be finite"),
        (Features(GOOD.cls[:1], GOOD.labels[:1]), {}, ValueError, "train must hold two features or more, got 1"),
        (Features(GOOD.cls[:0], GOOD.labels[:0]), {}, ValueError, "train must hold at least one feature, got none"),
    ],
)
def test_arguments(train, options, error, message):
    with pytest.raises(error, match=message):
        linear_probe(train, GOOD, **options)


def test_features_to_score():
    with pytest.raises(ValueError, match=r"test.cls must have shape \(any, 6\), got \(10, 4\)"):
        linear_probe(GOOD, GOOD._replace(cls=GOOD.cls[:, :4]))
    with pytest.raises(FloatingPointError, match=r"loss must be finite, got \w+ at step"):
        fit_probe(blobs(100, spread=9.0), method="sgd", lr=1e38)
    assert LinearProbe(6, 3)(GOOD.cls).shape == (10, 3)
