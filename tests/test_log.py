from dataclasses import replace

import pytest

from degrade.log import Epoch, from_csv, last_row, to_csv, to_rows

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
        (
            lambda text: text.replace("0.875", "0.8750"),
            "row 1: train_error_running is '0.8750', which degrade writes as 0",
        ),
        (lambda text: text.replace("1,8,", "1, 8,"), "row 1: step is ' 8', which degrade writes as 8"),
        (lambda text: text.replace("2,16", "2,1_6"), "row 2: step is '1_6', which degrade writes as 16"),
        (lambda text: text.replace("2,16", f"2,{2**63}"), "step has a number of more than 64 bits"),
        (lambda text: text.replace("\n", "\r\n"), "there are carriage returns in it; git's core.autocrlf adds them"),
    ],
)
def test_other_logs_are_refused(change, message):
    with pytest.raises(ValueError) as error:
        from_csv(change(to_csv(ROWS, validation=False)))
    assert message in str(error.value)


MANY = [Epoch(i, 8 * i, 0.1, 1 / i, 1 / i, 1 / i, 1 / i, 1 / i) for i in range(1, 12)]


class TestLastRow:
    @pytest.mark.parametrize("validation", [False, True])
    @pytest.mark.parametrize("length", [1, 2, 11])
    def test_it_is_the_last_of_all(self, length, validation):
        rows = [replace(row, val_loss=1.0, val_error=0.5) if validation else row for row in MANY[:length]]
        columns = last_row(to_csv(rows, validation=validation).encode())
        assert to_rows(columns) == rows[-1:]

    @pytest.mark.parametrize("end", [0, 1, 50, -1, -2])
    def test_none_of_a_log_that_is_cut(self, end):
        assert last_row(to_csv(MANY, validation=False).encode()[:end]) is None

    @pytest.mark.parametrize("rows", [[], MANY[1:], MANY[:3] + MANY[5:], [*MANY, MANY[-1]], [*MANY[:2], *MANY]])
    def test_none_of_a_log_whose_rows_do_not_count_up_to_the_last(self, rows):
        assert last_row(to_csv(rows, validation=False).encode()) is None

    @pytest.mark.parametrize(
        ("old", "new"), [(b"0.1,", b"0.1 "), (b"0.1,", b"0.1,,"), (b",8,", b",8_0,"), (b"11,88", b"11,x")]
    )
    def test_none_where_something_looks_amiss(self, old, new):
        log = to_csv(MANY, validation=False).encode()
        assert log.replace(old, new, 1) != log
        assert last_row(log.replace(old, new, 1)) is None
