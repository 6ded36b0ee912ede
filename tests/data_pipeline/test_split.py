"""Split: what is held out."""

import pytest

from m3ae_fast.data import MixedDataset, Sample, ShapesDataset, Split


class Numbered(list):
    """Texts that say their number."""

    def __init__(self, count):
        super().__init__(Sample(None, (str(i),), str(i)) for i in range(count))

    def captions(self):
        return (sample.captions[0] for sample in self)


def names(split):
    return [split[i].name for i in range(len(split))]


def test_each_sample_is_on_one_side_and_stays_there_where_others_are_appended():
    small, large = (Split(Numbered(count), 0.2) for count in (1000, 3000))
    assert sorted(map(int, names(small) + names(small.held_out))) == list(range(1000))
    assert names(small) == [name for name in names(large) if int(name) < 1000]
    assert len(small.held_out) == pytest.approx(200, abs=60)
    assert [small.read(i).name for i in range(5)] == names(small)[:5]
    assert len(list(small.captions())) == 1000


def test_a_mixture_holds_out_of_each_by_the_same_weights():
    mixture = MixedDataset([Split(Numbered(100), 0.5), Split(Numbered(50), 0.1)], [3, 1])
    assert mixture.held_out.weights == (3, 1)
    assert [names(each) for each in mixture.held_out.sources] == [names(each.held_out) for each in mixture.sources]


def test_a_side_without_a_sample_is_refused():
    with pytest.raises(ValueError, match=r"got 0.01, which holds out 0 of 3"):
        Split(Numbered(3), 0.01)
    with pytest.raises(ValueError, match="holds out 3 of 3"):
        Split(Numbered(3), 0.999)
    with pytest.raises(ValueError, match="must be 0 for data without an end"):
        Split(ShapesDataset(32), 0.5)
