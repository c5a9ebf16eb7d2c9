"""What a person reads holds nothing that steers a terminal, and no secret."""

import pytest

from di_refine import terminal


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://me:pa@ss@host.org/x.pkl, and user@host", "https://***@host.org/x.pkl, and user@host"),
        ("https://host/a@b?c=d@e", "https://host/a@b?c=d@e"),
        ("https://token@host/x", "https://***@host/x"),
        ("http://h/x?v=1&X-Amz-Signature=ab12&n=2 is it", "http://h/x?v=1&X-Amz-Signature=***&n=2 is it"),
    ],
)
def test_secrets_in_addresses_are_not_shown(text, shown):
    assert terminal.clean(text) == shown
    assert terminal.without_secrets({text: [text, 1], "b": (None,)}) == {shown: [shown, 1], "b": (None,)}


def test_control_characters_are_spelled():
    assert terminal.clean("a\x1b[2J\r\x9b\u202eb\udc80") == r"a\x1b[2J\r\x9b\u202eb\udc80"
    assert terminal.clean("zwei\nZeilen €") == "zwei\nZeilen €"


def test_everything_that_is_shown_is_clean(capsys):
    evil = "x\x1b]0;y\x07 https://u:p@h/"
    assert terminal.say(f"note:\n{evil}") == r"note: x\x1b]0;y\x07 https://***@h/"
    terminal.show(evil)
    terminal.table([[evil, 1]], [evil, "b"])
    terminal.print_result({"a": [evil]})
    with terminal.progress(1, evil, every=0) as bar:
        bar.note(evil)
        bar.update()
    out, err = capsys.readouterr()
    assert "\x1b" not in out + err and "u:p" not in out + err and err.count(r"\x1b]0;y\x07") == 3


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test moves."""
    now = [1000.0]
    monkeypatch.setattr(terminal.time, "monotonic", lambda: now[0])
    return now


def lines(capsys):
    return capsys.readouterr().err.splitlines()


def test_lines_come_after_two_seconds_and_then_every_ten(clock, capsys):
    with terminal.progress(100, "sampling", "img") as bar:
        for _ in range(40):
            clock[0] += 1
            bar.update()
    shown = [line.split()[1] for line in lines(capsys)]
    assert shown == ["2/100", "12/100", "22/100", "32/100", "40/100"]


def test_the_rate_is_of_now(clock, capsys):
    """Neither what was done before nor other work in between counts, and what is long ago is forgotten."""
    with terminal.progress(1000, "training", "img", done=500) as bar:
        clock[0] += 2
        bar.update(20)
        assert lines(capsys) == ["training: 520/1000 img (52%), 10 img/s, 48s left"]
        with bar.pause():
            clock[0] += 600
        clock[0] += 10
        bar.update(40)
        assert lines(capsys) == ["training: 560/1000 img (56%), 5 img/s, 1m 28s left"]
        for _ in range(5):
            clock[0] += 10
            bar.update(10)
        assert lines(capsys)[-1] == "training: 610/1000 img (61%), 1 img/s, 6m 30s left"
        clock[0] += 10
        bar.update(1000)
    assert lines(capsys) == ["training: 1000/1000 img (100%), 6.944 img/s, took 1m 12s"]


def test_the_time_limit_is_what_is_left_where_it_comes_first(clock, capsys):
    with terminal.progress(1000, "training", "img", max_seconds=100) as bar:
        with bar.pause():
            clock[0] += 30
        clock[0] += 10
        bar.update(10)
        assert lines(capsys) == ["training: 10/1000 img (1%), 1 img/s, 1m 00s left to the time limit"]


def test_a_long_unit_of_work_is_said_to_go_on_and_can_be_ended(clock, capsys):
    """`beat` reaches the innermost progress, and nothing when there is none."""
    wanted = [False]

    def check():
        if wanted[0]:
            raise InterruptedError

    terminal.beat()
    with terminal.progress(5, "training"), terminal.progress(2, "sampling", "img", check=check):
        clock[0] += 3
        terminal.beat()
        assert lines(capsys) == ["sampling: 0/2 img (0%), 0 img/s"]
        wanted[0] = True
        with pytest.raises(InterruptedError):
            terminal.beat()
    terminal.beat()


def test_a_wide_table_goes_on_below(capsys):
    terminal.table([["net", 1, 22, "x"], ["another", 3, 4, "y"]], ["name", "a" * 30, "b" * 30, "c" * 40], width=80)
    out = capsys.readouterr().out.splitlines()
    assert max(map(len, out)) <= 80 and out[4] == "" and len(out) == 9
    assert out[0].split() == ["name", "a" * 30, "b" * 30] and out[5].split() == ["name", "c" * 40]
    assert out[2].split() == ["net", "1", "22"] and out[8].split() == ["another", "y"]
