from dataclasses import replace

import pytest

from degrade.log import Epoch, from_csv, to_csv

ROWS = [
    Epoch(1, 8, 0.1, 2.25, 0.1 + 0.2, 0.875, 2.5, 0.75),
    Epoch(2, 16, 0.1 / 10, 1e-17, 0.0, 0.5, float("inf"), 1.0),
]


def test_the_file_to_the_byte():
    assert to_csv(ROWS, validation=False) == (
        "epoch,step,lr,train_loss,train_error,train_error_running,test_loss,test_error\n"
        "1,8,0.1,2.25,0.30000000000000004,0.875,2.5,0.75\n"
        "2,16,0.01,1e-17,0.0,0.5,inf,1.0\n"
    )


def test_reading_gives_the_same_numbers_back():
    assert from_csv(to_csv(ROWS, validation=False)) == ROWS
    row = Epoch(1, 8, 0.1, 1.0, 0.5, 0.5, 1.0, 0.5, 0.25, 0.125)
    text = to_csv([row], validation=True)
    assert text.splitlines()[0].endswith(",val_loss,val_error")
    assert from_csv(text) == [row]


def test_an_infinite_training_loss_is_diverged():
    assert replace(ROWS[0], train_loss=float("inf")).diverged


def test_nan_is_diverged():
    row = Epoch(1, 8, 0.1, float("nan"), 0.9, 0.9, float("nan"), 0.9)
    assert row.diverged
    assert from_csv(to_csv([row], validation=False))[0].diverged
    assert not ROWS[1].diverged  # an infinite test loss is not


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: "epoch,loss\n1,2\n", "the header is not degrade's: 'epoch,loss'"),
        (lambda text: "", "the header is not degrade's"),
        (lambda text: text.rstrip().rpartition(",")[0] + "\n", "row 2 has 7 values, the header 8"),
        (lambda text: text.replace("2.25,0.30000000000000004", "2.25,45.6"), "row 1: train_error must be from 0 to 1"),
        (lambda text: text.replace("0.875", "nan"), "row 1: train_error_running must be from 0 to 1; got nan"),
        (lambda text: text.replace("2,16", "2,8"), "row 2: its step, 8, is not above the one before"),
        (lambda text: text[:-1], "the last row is cut off"),
        (lambda text: text[:-2], "the last row is cut off"),
        (lambda text: '"' + "x" * 200_000, "the header is not degrade's"),
        (lambda text: text.replace("0.875", "much"), "row 1: could not convert"),
        (lambda text: text + text.splitlines()[2] + "\n", "row 3 is epoch 2"),
        (lambda text: text.replace("2,16", "3,16"), "row 2 is epoch 3"),
    ],
)
def test_other_logs_are_refused(change, message):
    with pytest.raises(ValueError) as error:
        from_csv(change(to_csv(ROWS, validation=False)))
    assert message in str(error.value)
