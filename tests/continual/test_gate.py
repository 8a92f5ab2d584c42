import math
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from dougong.continual.suite.ask import Asked, Scored
from dougong.continual.suite.gate import Verdict, check_override, compare
from dougong.continual.suite.performance import compare_seconds
from dougong.continual.suite.report import as_junit, as_markdown
from dougong.continual.suite.statistics import detectable_loss, holm, loss_beyond
from dougong.continual.suite.suite import Dataset, MetricCheck, Suite
from dougong.core.errors import ConfigError


def scores(lost: int, won: int, number: int) -> tuple[Any, Any]:
    before, after = np.ones(number), np.ones(number)
    after[:lost] = 0
    before[lost : lost + won] = 0
    return before, after


@pytest.mark.parametrize(("lost", "won"), [(0, 0), (5, 5), (9, 1), (30, 10)])
def test_without_a_margin_it_is_the_exact_binomial_test(lost: int, won: int) -> None:
    found = loss_beyond(*scores(lost, won, 200), 0.0)

    expected = 1.0 if lost + won == 0 else stats.binomtest(lost, lost + won, alternative="greater").pvalue
    assert found.p == pytest.approx(expected)
    assert found.mean == pytest.approx((lost - won) / 200)


def test_with_no_margin_the_score_test_is_mcnemar_s() -> None:
    lost, won, number = 1200, 1000, 5000
    found = loss_beyond(*scores(lost, won, number), 0.0)
    assert found.p == pytest.approx(1 - stats.norm.cdf((lost - won) / math.sqrt(lost + won)), abs=1e-9)


def test_a_margin_that_is_the_loss_itself_says_nothing() -> None:
    assert loss_beyond(*scores(30, 10, 400), 0.05).p == pytest.approx(0.5, abs=0.02)
    assert loss_beyond(*scores(60, 10, 400), 0.05).p < 0.001


def test_false_alarms_at_the_margin_are_as_rare_as_said() -> None:
    random = np.random.default_rng(0)
    alarms = 0
    for _ in range(600):
        before = (random.random(300) < 0.9).astype(float)
        flip = random.random(300)
        # .05 lost on balance, besides .04 that go either way.
        after = np.where((before == 1) & (flip < 0.095), 0.0, np.where((before == 0) & (flip < 0.36), 1.0, before))
        true_loss = 0.9 * 0.095 - 0.1 * 0.36
        alarms += loss_beyond(before, after, true_loss).p < 0.05
    assert 0.02 < alarms / 600 < 0.08


def test_records_of_one_unit_count_as_one() -> None:
    before, after = scores(12, 0, 120)
    unit = np.repeat(np.arange(10), 12)  # all that was lost is of one unit
    assert loss_beyond(before, after, 0.0).p < 0.001
    assert loss_beyond(before, after, 0.0, unit_N=unit).p > 0.05


def test_the_bootstrap_agrees_with_student_s_test() -> None:
    random = np.random.default_rng(1)
    before, after = random.normal(size=200), random.normal(-0.12, size=200)
    found = loss_beyond(before, after, 0.0)
    expected = stats.ttest_rel(before, after, alternative="greater").pvalue
    assert found.p == pytest.approx(expected, abs=0.02)
    assert loss_beyond(before, after, 0.0).p == found.p


def test_holm_worked_by_hand() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([]) == []


def test_a_loss_that_is_said_to_be_seen_is_seen() -> None:
    random = np.random.default_rng(2)
    seen = detectable_loss(400, 0.04, 0.02, alpha=0.05, tests=20, power=0.95)
    assert 0.02 < seen < 0.2
    caught = 0
    for _ in range(200):
        drawn = random.random(400)
        lost, won = drawn < 0.02 + seen, drawn > 0.98
        caught += loss_beyond((~won).astype(float), (~lost).astype(float), 0.02).p < 0.05 / 20
    assert caught / 200 >= 0.93
    assert detectable_loss(1, 0.0, 0.0, alpha=0.05, tests=1, power=0.9) == math.inf
    assert detectable_loss(10, 0.0, 0.0, alpha=0.05, tests=100, power=0.9) > 0.9


def suite() -> Suite:
    return Suite(name="s", data={"d": Dataset(table="d.csv")}, checks=(MetricCheck(name="c", data="d"),))


def asked(score_N: Any, part: str = "", least: float | None = None) -> Scored:
    return Scored("c", "metric", part, "all", np.arange(len(score_N)), score_N, None, 0.02, least)


def test_a_loss_in_one_slice_is_refused_with_its_records() -> None:
    before, after = scores(40, 2, 400)
    same = np.ones(400)
    said = (dict.fromkeys(range(400), "yes"), dict.fromkeys(range(400), "no <|>"))
    old = Asked((asked(same), asked(before, "maker = r0")), {"c": said[0]})
    new = Asked((asked(same), asked(after, "maker = r0")), {"c": said[1]})

    compared = compare(new, old, suite())

    assert [one.refused for one in compared] == [False, True]
    assert compared[1].num_changed == 40
    assert compared[1].changed[0] == (0, "yes", "no <|>")
    assert "a loss of 0.0950" in compared[1].reason
    verdict = Verdict("s", False, tuple(compared), "colours 1")
    assert verdict.in_words().startswith("refused: c / maker = r0: 0.9950 was and 0.9000 is")
    root = ElementTree.fromstring(as_junit(verdict))
    assert root.attrib["failures"] == "1"
    assert "record 0: yes -> no <|>" in (root.findtext(".//failure") or "")
    page = as_markdown(verdict)
    assert page.startswith("# s: REFUSED")
    assert "no <\\|>" in page
    assert "and 20 more" in page


def test_the_same_version_passes_and_a_floor_holds_alone() -> None:
    before, _ = scores(0, 40, 400)
    same = Asked((asked(before),), {})
    assert not compare(same, same, suite())[0].refused
    assert compare(same, None, suite())[0].before is None
    floor = Asked((asked(before, least=0.95),), {})
    found = compare(floor, None, suite())[0]
    assert found.refused
    assert found.reason == "0.9000 is below 0.95, which the suite asks for"


def test_control_characters_do_not_break_the_xml() -> None:
    old, new = Asked((asked(np.ones(50)),), {"c": {0: "a\x00\x1b"}}), Asked((asked(np.zeros(50)),), {})
    verdict = Verdict("s\x07", False, tuple(compare(new, old, suite())), None)
    ElementTree.fromstring(as_junit(verdict))


def test_a_slower_version_is_told_from_an_equal_one(monkeypatch: pytest.MonkeyPatch) -> None:
    random = np.random.default_rng(0)
    clock = [0.0]
    monkeypatch.setattr("dougong.continual.suite.performance.time.perf_counter", lambda: clock[0])

    def takes(seconds: float) -> Any:
        def call() -> None:
            clock[0] += seconds * (1 + 0.1 * random.random())

        return call

    assert compare_seconds(takes(1.0), takes(1.5), 15).low > 1.25
    equal = compare_seconds(takes(1.0), takes(1.0), 15)
    assert equal.low < 1.05
    assert 0 < equal.noise < 0.1


def test_an_override_needs_a_reason(tmp_path: Path) -> None:
    assert check_override(None) is None
    assert check_override("the slice was mislabelled") == "the slice was mislabelled"
    with pytest.raises(ConfigError, match="is no reason"):
        check_override("because")
