"""Counting: every object has a status and a reason, and damaged or odd tables never count in silence."""
import numpy as np
import pytest

from eq.core.registry import EqError
from eq.quantification.counting import CountingRules, LabelledImage, count_instances, glomeruli_table, ledger_of
from eq.quantification.instances import instance_table


def ledger(board: np.ndarray, **how):
    return count_instances(board, instance_table(board), CountingRules(**how))


def test_an_object_that_fills_the_image_is_partial():
    for rule in ("border_weights", "whole_section"):
        table = ledger(np.ones((20, 20), np.int32), rule=rule)
        assert table["status"].tolist() == ["partial"] and table["weight"].tolist() == [0.0]
        assert "cut by the border" in table["reason"][0]


def test_the_widest_object_that_is_whole_has_a_finite_weight():
    board = np.zeros((20, 20), np.int32)
    board[1:19, 1:19] = 1
    assert ledger(board)["weight"].tolist() == [400.0]  # it fits whole at one place only


def test_one_pixel_counts_unless_a_limit_says_no():
    board = np.zeros((20, 20), np.uint16)
    board[5, 5] = 3
    assert ledger(board)["status"].tolist() == ["counted"]
    assert ledger(board, min_diameter=2)["status"].tolist() == ["excluded"]


def test_nothing_to_count():
    assert len(ledger(np.zeros((9, 9), np.int32))) == 0
    assert {"status", "reason", "weight"} <= set(ledger(np.zeros((9, 9), np.int32)).columns)


def test_a_narrow_guard_is_told():
    "An object that the frame selects but the image cuts: the ledger blames the guard."
    board = np.zeros((30, 30), np.int32)
    board[0:12, 10:14] = 1
    table = ledger(board, rule="frame", guard=(2, 2, 2, 2))
    assert table["status"].tolist() == ["partial"] and "guard" in table["reason"][0]


def test_a_frame_needs_room():
    board = np.zeros((30, 30), np.int32)
    board[2:29, 2:20] = 1
    with pytest.raises(EqError, match="no frame is left"):
        ledger(board, rule="frame", guard=(20, 1, 20, 1))


def test_every_row_is_told_exactly_one_thing():
    rng = np.random.default_rng(0)
    board = np.zeros((200, 200), np.int32)
    for n in range(1, 40):
        y, x, h, w = rng.integers(0, 180, 2).tolist() + rng.integers(1, 30, 2).tolist()
        board[y : y + h, x : x + w] = n
    table = instance_table(board)
    table["gate"] = rng.choice(["accept", "refuse", "accept-wider"], len(table))
    for rule in ("border_weights", "whole_section", "frame"):
        found = count_instances(board, table, CountingRules(rule, min_diameter=6))
        counted = found["status"] == "counted"
        assert (found["reason"] == "").equals(counted) and (found["weight"] > 0).equals(counted)
        assert not (counted & (found["gate"] == "refuse")).any() and len(found) == len(table)


def test_labels_that_are_no_labels():
    with pytest.raises(EqError, match="valid: whole numbers"):
        glomeruli_table([LabelledImage("a.png", np.zeros((4, 4)), "s", "g")])


def test_the_cohort_keeps_every_glomerulus():
    board = np.zeros((40, 40), np.int32)
    board[5:15, 5:15], board[20:30, 0:9] = 1, 2
    images = [LabelledImage(f"folder/{n}.tif", board, f"m{n}", "control") for n in range(5)]
    table = glomeruli_table(images)
    assert len(table) == 10 and table["id"].is_unique and table["id"][3] == "1#2"
    assert ledger_of(table)[["found", "counted", "partial"]].values.tolist() == [[2, 1, 1]] * 5
