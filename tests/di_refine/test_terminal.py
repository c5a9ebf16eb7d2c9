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
