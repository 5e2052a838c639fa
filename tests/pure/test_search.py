"""The statistics of a search: what it draws, what it says, and how often it is wrong."""

import math

import numpy as np
import pytest
from comfyui import parts

(search,) = parts("search")


def searched(scores, **how):
    """A search that sees ``(settings, units)``, and its finding."""
    made = search.Search(*scores.shape)
    while made.todo:
        made.add(scores[np.ix_(made.alive, made.todo.units)])
    return made, made.finding(**how)


def alike(random, settings=9, units=48):
    """The same setting under every name: prompts differ, and so do pictures of one."""
    return random.normal(size=(1, units)) + random.normal(size=(settings, units))


def test_rounds_halve_the_settings_and_double_the_units():
    plan = [(each.settings, each.units) for each in search.rounds(8, 48)]
    assert plan == [(8, range(6)), (4, range(6, 12)), (2, range(12, 24)), (1, range(24, 48))]
    assert search.Search(9, 48).pictures() == (168, 9 * 48)
    assert [r.settings for r in search.rounds(5, 100)] == [5, 3, 2, 1]
    assert search.rounds(1, 24) == [search.Round(1, range(24))]


@pytest.mark.parametrize("settings", range(1, 20))
@pytest.mark.parametrize("units", [2, 3, 7, 8, 31, 96])
def test_every_search_ends_with_all_units(settings, units):
    plan = search.rounds(settings, units)
    assert [unit for each in plan for unit in each.units] == list(range(units))
    assert all(each.units for each in plan)
    assert len(plan[0].units) >= min(units, search.FIRST_UNITS)
    assert plan[0].settings == settings


def test_prompts_are_the_units_where_there_are_enough():
    assert search.units_of(2, 3) == [[(p, s)] for s in range(3) for p in range(2)]
    assert search.units_of(6, 2) == [[(p, 0), (p, 1)] for p in range(6)]


def reference(scores, searches, random):
    """By loops: the best setting's difference, its error, and the 95 % point of shuffled names."""

    def once(scores):
        names = list(range(1, len(scores)))
        for each in search.rounds(len(scores) - 1, scores.shape[1]):
            names = names[: each.settings]
            until = each.units.stop
            names.sort(key=lambda name: -(scores[name, :until] - scores[0, :until]).mean())
        difference = scores[names[0]] - scores[0]
        return difference.mean(), difference.std(ddof=1) / math.sqrt(len(difference))

    sizes = []
    for _ in range(searches):
        columns = [random.permutation(column) for column in scores.T]
        mean, error = once(np.stack(columns, 1))
        sizes.append(abs(mean / error))
    return *once(scores), np.quantile(sizes, 0.95)


@pytest.mark.parametrize(("settings", "units"), [(2, 10), (5, 16), (9, 48)])
def test_equals_a_search_by_loops(settings, units):
    """The names are shuffled there among all scores there are, not only among those it has seen."""
    random = np.random.default_rng(3)
    scores = alike(random, settings, units)
    mean, error, limit = reference(scores, 4000, random)
    _, found = searched(scores, shuffled=3999)
    assert found.difference == pytest.approx(mean)
    assert (found.high - found.low) / 2 == pytest.approx(limit * error, rel=0.06)
    assert (found.high + found.low) / 2 == pytest.approx(mean)


def winners(count, settings=9, units=48, shuffled=199):
    """How many searches among settings that are alike tell two apart; and by the usual interval."""
    random = np.random.default_rng(0)
    told = usual = 0
    for i in range(count):
        scores = alike(random, settings, units)
        _, found = searched(scores, shuffled=shuffled, seed=i)
        told += found.winner is not None
        difference = scores[found.best] - scores[0]
        usual += abs(difference.mean()) > 1.96 * difference.std(ddof=1) / math.sqrt(units)
    return told / count, usual / count


def test_finds_nothing_where_nothing_is():
    """In 5 %, within what 600 searches can say; by the usual interval in 9 %."""
    told, usual = winners(600)
    assert abs(told - 0.05) < 3 * math.sqrt(0.05 * 0.95 / 600)
    assert usual > 0.08


@pytest.mark.slow
@pytest.mark.parametrize(("settings", "units"), [(9, 48), (2, 24)])
def test_declares_a_winner_in_5_of_100(settings, units):
    told, _ = winners(5000, settings, units, shuffled=999)
    assert abs(told - 0.05) <= 0.006


def test_the_best_is_ranked_first():
    """Also beside one as good, whose mean is larger by a rounding error."""
    thirds = [[0] * 7, [3, 2, 1, 3, 2, 3, 0], [3, 3, 0, 1, 2, 3, 2]]
    made, found = searched(np.array(thirds) / 3)
    assert made.differences[2] > made.differences[1]
    assert found.best == 1
    assert made.ranking == [1, 2]
    made, found = searched(alike(np.random.default_rng(4)))
    assert made.ranking[0] == found.best
    units = [made.differences[setting][1] for setting in made.ranking]
    assert units == [48, 24, 12, 12, 6, 6, 6, 6]


def test_finds_what_is_there():
    random = np.random.default_rng(1)
    scores = alike(random)
    scores[6] += 1.5
    made, found = searched(scores)
    assert found.winner == found.best == 6
    assert found.low < 1.5 < found.high
    assert made.alive == [0, 6]
    assert made.differences.keys() == set(range(1, 9))
    assert made.differences[6] == (pytest.approx((scores[6] - scores[0]).mean()), 48)
    assert sorted(units for _, units in made.differences.values()) == [6] * 4 + [12] * 2 + [24, 48]
    scores[0] += 5
    assert searched(scores)[1].winner == 0


@pytest.mark.parametrize("scale", [100, 1e12, 1e-12])
def test_units_and_scale_do_not_matter(scale):
    """A prompt that is hard for all settings is no difference between them."""
    random = np.random.default_rng(2)
    scores = alike(random)
    scores[3] += 0.4
    _, found = searched(scores)
    _, moved = searched(scale * (scores + 10 * random.normal(size=(1, 48))))
    assert moved.best == found.best
    for name in ("difference", "low", "high"):
        assert getattr(moved, name) == pytest.approx(scale * getattr(found, name))


@pytest.mark.parametrize("shape", [(2, 2), (2, 5), (3, 4), (5, 2)])
def test_the_interval_has_0_in_it_where_there_is_no_winner(shape):
    """Few units have few shuffles, and the search that was made is often at their limit."""
    random = np.random.default_rng(0)
    for _ in range(200):
        _, found = searched(random.normal(size=shape), shuffled=199)
        assert (found.low <= 0 <= found.high) == (found.winner is None)


def test_differences_without_spread():
    """Alike in all: nothing is known of others. One that is better by as much everywhere wins."""
    scores = np.tile(np.arange(8.0), (3, 1))
    _, found = searched(scores)
    assert (found.winner, found.difference, found.high) == (None, 0, math.inf)
    scores[2] += 1
    _, found = searched(scores)
    assert (found.winner, found.difference) == (2, 1)
    _, found = searched(scores[:, :2])
    assert (found.winner, found.high) == (None, math.inf), "two units cannot tell"


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_no_number_is_refused(value):
    made = search.Search(2, 4)
    with pytest.raises(ValueError, match="not a finite number"):
        made.add([[1.0, 2.0, 3.0, 4.0], [1.0, value, 3.0, 4.0]])
    with pytest.raises(ValueError, match="wrong shape"):
        made.add([[1.0, 2.0, 3.0, 4.0]])
    with pytest.raises(ValueError, match="two settings"):
        search.Search(1, 4)
    with pytest.raises(ValueError, match="two units"):
        search.Search(2, 1)
