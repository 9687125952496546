"""The arithmetic of `./dev bench images`."""

from __future__ import annotations

from tests.bench.images import Found, document, options
from tests.bench.measure import Cost

SIZES = {"image_bytes": 25, "initrd_bytes": 5, "kernel_bytes": 10, "modules": 3, "disk_bytes": 9000, "data_bytes": 1000}


def cost(seconds, cpu, rss=1):
    return Cost(seconds, cpu, rss, rss)


def test_all_at_once_is_compared_with_the_sum_of_the_same_round():
    """I6: seconds, memory and bytes; and whether the images were equal."""
    found = Found({"a": [cost(1, 1), cost(2, 1)], "b": [cost(3, 2), cost(2, 3)]}, [cost(2, 3, 7), cost(3, 4, 9)])
    told = document(found, {"a": SIZES, "b": SIZES})
    assert told["alone"] == {"seconds": 4, "cpu_seconds": 3.5}
    assert told["at_once_against_alone"]["seconds"] == {"median": 0.625, "lowest": 0.5, "highest": 0.75}
    assert told["at_once_against_alone"]["cpu_seconds"]["median"] == 1
    assert (told["at_once"]["builds"], told["at_once"]["peak_rss_bytes"]) == (2, 9)
    assert [one["name"] for one in told["builds"]] == ["a", "b"] and told["builds"][0]["image_per_data"] == 0.025
    assert told["all_equal"] and told["unequal"] == []


def test_an_image_that_differs_is_named():
    found = Found({"a": [cost(1, 1)]}, [cost(1, 1)], unequal={"a"})
    told = document(found, {"a": SIZES})
    assert (told["all_equal"], told["unequal"]) == (False, ["a"])


def test_a_quick_run_has_one_round():
    assert (options([]).rounds, options(["--quick"]).rounds, options(["--quick", "--rounds", "2"]).rounds) == (4, 1, 2)
