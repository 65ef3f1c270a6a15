"""A cost matrix is read by the names of its classes, and the mean cost is that of the mistakes that were made."""

from __future__ import annotations

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from manyeyes.errors import UsageError
from manyeyes.evaluation.costs import mean_cost, read_cost_matrix

NAMES = ("cat", "dog", "red, or so")


def test_rows_and_columns_may_come_in_any_order(tmp_path):
    file = tmp_path / "costs.csv"
    file.write_text('true, dog,"red, or so",cat\ncat,5,1.5,0\n"red, or so",3,0,2\n\ndog,0,7,-1\n', encoding="utf-8-sig")
    assert read_cost_matrix(str(file), NAMES).tolist() == [[0, 5, 1.5], [-1, 0, 7], [2, 3, 0]]


def test_class_names_with_blanks_at_their_ends_are_found(tmp_path):
    file = tmp_path / "costs.csv"
    file.write_text(", cat,cat, dog \n cat,0,1,2\ncat,3,0,4,\n dog ,5,6,0\n")
    assert read_cost_matrix(str(file), (" cat", "cat", "dog")).tolist() == [[0, 1, 2], [3, 0, 4], [5, 6, 0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        (",cat,dog\ncat,0,1\ndog,1,0\n", "first row .* each of the 3 classes once, but not so 'red, or so'"),
        (',cat,dog,"red, or so"\ncat,0,1,1\ndog,1,0,1\ndog,1,0,1\n', "first column .* but not so 'dog'"),
        (
            ',cat,dog,"red, or so"\ncat,0,1,1\ndog,1,0\n"red, or so",1,1,0\n',
            "has '' for 'dog' taken for 'red, or so', which is not a number",
        ),
        (
            ',cat,dog,"red, or so"\ncat,0,1,1\ndog,1,0,1,7\n"red, or so",1,1,0\n',
            "has 4 numbers for 'dog', expected 3",
        ),
        (',cat,dog,"red, or so"\ncat,0,inf,1\ndog,1,0,1\n"red, or so",1,1,0\n', "has 'inf' for 'cat' taken for 'dog'"),
    ],
)
def test_a_bad_file_is_one_clear_line(tmp_path, text, message):
    file = tmp_path / "costs.csv"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_cost_matrix(str(file), NAMES)
    with pytest.raises(UsageError, match="can't be read"):
        read_cost_matrix(str(tmp_path / "none.csv"), NAMES)


def test_the_mean_cost_and_its_interval_are_those_of_the_single_costs():
    draw = np.random.default_rng(0)
    labels, predicted, costs = draw.integers(0, 4, 500), draw.integers(0, 4, 500), draw.normal(size=(4, 4))
    matrix = np.zeros((4, 4), np.int64)
    np.add.at(matrix, (labels, predicted), 1)
    mean, interval = mean_cost(matrix, costs, 0.95)
    single = costs[labels, predicted]
    assert mean == pytest.approx(single.mean())
    half_width = 1.959963985 * single.std(ddof=1) / np.sqrt(500)
    assert (interval.low, interval.high) == pytest.approx((mean - half_width, mean + half_width))
    assert mean_cost(matrix, np.ones((4, 4)), 0.95) == (1.0, None)


def test_the_command_tells_what_mistakes_cost(small_bundle, small_dataset, tmp_path):
    from manyeyes.cli.main import app

    file = tmp_path / "costs.csv"
    file.write_text(",red,green,blue\nred,1,2,2\ngreen,2,1,2\nblue,2,2,1\n")
    arguments = ["evaluate", small_bundle, small_dataset, "--engine", "inline", "--cost-matrix", str(file)]
    result = CliRunner().invoke(app, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    metrics = json.loads(result.stdout)["metrics"]
    assert metrics["mean_cost"] == pytest.approx(2 - metrics["accuracy"])
